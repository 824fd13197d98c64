"""Passes in bfloat16 behind noise: taken only where the noise hides what they move."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.inversion.noise.fast_passes import fast_passes, passes_behind
from sipit.inversion.noise.prefixes import BeamPrefixes
from sipit.models import LanguageModel
from sipit.observations import Cut
from tests.tiny_models import random_ids, text_model, tiny_model

CUT = Cut(2)
IDS = random_ids(24, seed=8)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model()


def _moved(lm: LanguageModel) -> float:
    """Return by how much fast passes move a coordinate, measured on a prompt of its own: a root mean square."""
    states = lm.cut(CUT).ordinary(IDS)
    with fast_passes(lm)():
        return float((lm.cut(CUT).ordinary(IDS) - states)[1:].square().mean().sqrt())


def test_noise_far_above_bfloat16_takes_fast_passes_and_other_noise_does_not(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sipit.inversion.inverses.arithmetic.is_fast_in_bfloat16", lambda _: True)
    moved = _moved(lm)
    assert moved > 0
    for noise, is_fast in (
        (NoiseModel.gaussian(200 * moved), True),
        (NoiseModel.gaussian(10 * moved), False),
        (NoiseModel.uniform(200 * moved), False),
        (NoiseModel.gaussian(torch.tensor([200 * moved] * 31 + [moved])), False),  # one quiet coordinate tells
    ):
        assert (passes_behind(lm, CUT, noise, Meter()) is not nullcontext) == is_fast


def test_a_model_in_another_dtype_keeps_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sipit.inversion.inverses.arithmetic.is_fast_in_bfloat16", lambda _: True)
    lm = LanguageModel(tiny_model("llama").double())
    states = lm.cut(CUT).ordinary(IDS)
    with fast_passes(lm)():
        assert torch.equal(lm.cut(CUT).ordinary(IDS), states)


def test_beams_in_bfloat16_lie_near_exact_ones_in_every_family(
    family_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sipit.inversion.inverses.arithmetic.is_fast_in_bfloat16", lambda _: True)
    cut, known = family_lm.final_cut, IDS[:3] % family_lm.vocab_size
    states = []
    for passes in (nullcontext, fast_passes(family_lm)):
        prefixes = BeamPrefixes(family_lm.cut(cut), known, max_batch=8, passes=passes)
        prefixes.grow(torch.tensor([5, 9]), torch.tensor([0, 0]))
        states.append(prefixes.states(torch.tensor([7, 7, 8]), torch.tensor([0, 1, 1])))
    exact, fast = states
    assert 0 < float((fast - exact).norm()) < 0.05 * float(exact.norm())
