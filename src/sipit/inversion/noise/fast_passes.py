"""Passes of a search behind noise: in bfloat16 where that is fast, and moves states by far less than the noise does.

Where it moves a state by a fiftieth of the noise, the likelihoods of two states are off against one another by half a
nat. The residuals and the distances of the prompt that is found are those of an ordinary pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from sipit.inversion.inverses.arithmetic import fast_arithmetic
from sipit.inversion.judging.calibration import calibration_prompts
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.models import LanguageModel
from sipit.observations import Cut

_SHARE = 0.02  # of the noise's standard deviation that bfloat16 may move a state by

Passes = Callable[[], AbstractContextManager[Any]]  # what passes are run within


def fast_passes(lm: LanguageModel) -> Passes:
    """Return a context for passes in bfloat16 where that is fast, in the model's own arithmetic elsewhere."""
    return partial(fast_arithmetic, lm.device, lm.dtype)


def passes_behind(lm: LanguageModel, cut: Cut, noise: NoiseModel, meter: Meter) -> Passes:
    """Return a context for passes whose states are compared with rows under a noise model.

    Not fast under a uniform law, whose likelihood ends at an edge.
    """
    moved = _moved(lm, cut, meter)  # (W,)
    spread = noise.variances(len(moved)).to(moved).sqrt() * abs(noise.scale)
    is_hidden = noise.law == "gaussian" and bool((moved / spread).square().mean() <= _SHARE**2)
    return fast_passes(lm) if is_hidden else nullcontext


def _moved(lm: LanguageModel, cut: Cut, meter: Meter) -> Tensor:
    """Return by how much fast passes move each coordinate of a state, measured once: root mean squares. (W,)."""

    def made() -> Tensor:
        prompt, model = calibration_prompts(lm)[-1], lm.cut(cut)
        states = model.ordinary(prompt)
        with fast_passes(lm)():
            moved = model.ordinary(prompt) - states
        meter.spend(2 * len(prompt), model.layer)
        return moved[1:].float().square().mean(dim=0).sqrt().cpu()  # a prompt's first row is looked up, not run

    return lm.derived(("moved by fast passes", cut), made)
