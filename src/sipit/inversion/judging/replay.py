"""One ordinary forward pass of claimed tokens, against what was observed: the judgement that a search ends in.

Trusts nothing of a search: it runs the model's own forward pass and measures its own tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.float64 import float64_device
from sipit.inversion.judging.noise import SAFETY, local_noise
from sipit.inversion.judging.tolerance import tolerance_for
from sipit.models import LanguageModel
from sipit.observations import Observation

_REMEASURED = 16  # positions whose own noise is measured, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """How the rows of an observation compare with the states of claimed tokens. T rows."""

    states: Tensor  # (T, W) of the ordinary pass, float32 or wider
    observed: Tensor  # (T, W) in the same dtype
    distances: Tensor  # (T,) float64, L2
    excess: Tensor  # (T,) float64: beyond what the rounding of the stored values explains
    needs_noise: Tensor  # (T,) bool: whether the measured noise floor alone does not explain the excess
    allowed: Tensor  # (T,) float64: tolerances, any declared noise and that of states that amplify rounding included
    over: Tensor  # (T,) float64: how far the excess lies beyond all noise; a row holds where this is not above 0
    block_tokens: int  # cost


def replay(lm: LanguageModel, seen: Observation, input_ids: Tensor, *, noise: float = 0.0) -> Replay:
    """Compare observed rows with the states that tokens have there, by one ordinary forward pass.

    Args:
        lm: the model.
        seen: rows at any positions of the prompt.
        input_ids: the whole prompt, known prefix included: (P + T,).
        noise: L2 distance that is declared to have been added to the states.
    """
    ids = input_ids.cpu().long()
    limits = tolerance_for(lm, seen)
    cut = lm.cut(seen.cut, seq_len=len(ids))
    states = cut.ordinary(ids)
    states = states[torch.tensor(seen.positions, device=states.device)]  # (T, W)
    block_tokens = len(ids) * seen.layer
    wide = torch.promote_types(torch.promote_types(states.dtype, seen.states.dtype), torch.float32)
    device = states.device if wide == torch.float32 else float64_device(states.device)
    states, observed = states.to(device, wide), seen.states.to(device, wide)
    rows = torch.arange(len(states))
    distances = limits.distances(states, observed, rows).cpu().double()  # (T,)
    excess = limits.excess(states, observed, rows).cpu().double()  # (T,)
    allowed = limits.total + noise  # (T,)
    # What the rounding explains is at most the norm of the half steps, which `allowed` adds to the noise: a row whose
    # excess is within the noise is within its tolerance by plain distance too, which so needs no check of its own.
    over = excess - limits.noise - noise  # (T,)
    for row in over.argsort(descending=True)[:_REMEASURED].tolist():
        if over[row] > 0:  # a state may amplify rounding: measure its own
            position = seen.positions[row]
            more, spent = local_noise(cut, ids[:position], int(ids[position]), seq_len=len(ids))
            block_tokens += spent * seen.layer
            more = max(0.0, SAFETY * more - float(limits.noise[row]))
            allowed[row] += more
            over[row] -= more
    return Replay(
        states=states,
        observed=observed,
        distances=distances,
        excess=excess,
        needs_noise=excess > limits.noise,
        allowed=allowed,
        over=over,
        block_tokens=block_tokens,
    )
