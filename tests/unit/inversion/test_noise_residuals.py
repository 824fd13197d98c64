"""What noise leaves along the directions in which tokens differ: normal for the right prompt, not for a near one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sipit import LanguageModel, Observation
from sipit.inversion import NoiseModel
from sipit.inversion.judging.directions import directions, directions_of
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.residuals import Residuals, residuals_of
from sipit.inversion.noise.beam_search import Beams
from sipit.inversion.noise.decode import Decoded, verdict_of
from tests.tiny_models import random_ids, text_model

IDS = random_ids(12, seed=3, vocab_size=256)
SIGMA = 0.3


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model()


def _noisy(lm: LanguageModel, seed: int, *, dropped: float = 0.0) -> Observation:
    seen, generator = lm.capture(input_ids=IDS, layer=2), torch.Generator().manual_seed(seed)
    rows = seen.states + SIGMA * torch.randn(seen.states.shape, generator=generator)
    return replace(seen, states=rows * (torch.rand(rows.shape, generator=generator) >= dropped))


def _of(lm: LanguageModel, seed: int, *, dropped: float = 0.0) -> Residuals:
    noise = replace(NoiseModel.gaussian(SIGMA), drops=dropped > 0)
    return residuals_of(lm, _noisy(lm, seed, dropped=dropped), IDS, noise, Meter())


@pytest.mark.parametrize("dropped", [0.0, 0.4])
def test_the_right_prompt_leaves_a_normal_deviation(lm: LanguageModel, dropped: float) -> None:
    found = [_of(lm, seed, dropped=dropped) for seed in range(60)]
    for deviation, most in (("all_along", 1.0), ("in_common", 0.5)):  # the first is the largest of three
        deviations = torch.tensor([getattr(one, deviation) for one in found])
        assert -0.5 < float(deviations.mean()) < most
        assert 0.7 < float(deviations.std()) < 1.3
        assert float(deviations.max()) < 3.5
    assert max(one.row_along for one in found) < 4.5  # of 720 rows
    assert sum(one.row_along > 2.5 for one in found) < 20  # some 10 of 60, of 12 rows and three sets each


def test_rows_wider_than_the_differences_are_many_have_the_same_directions() -> None:
    generator = torch.Generator().manual_seed(1)
    differences = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    held = (0.5, 0.9)
    wide, by_gram = directions(differences, held), directions_of(differences.T @ differences, held)
    for one, other in zip(wide, by_gram, strict=True):
        torch.testing.assert_close(one @ one.T, other @ other.T)


def test_a_vector_in_all_rows_is_told_from_noise(lm: LanguageModel) -> None:
    vector = torch.randn(1, lm.d_model, generator=torch.Generator().manual_seed(7)) * 0.4 * SIGMA
    seen = _noisy(lm, 1)
    found = residuals_of(lm, replace(seen, states=seen.states + vector), IDS, NoiseModel.gaussian(SIGMA), Meter())
    assert found.is_noise
    assert len(found.doubts) == 1
    assert "alike" in found.doubts[0]
    known = replace(NoiseModel.gaussian(SIGMA), shift=vector[0].double())
    assert not residuals_of(lm, replace(seen, states=seen.states + vector), IDS, known, Meter()).doubts


@pytest.mark.parametrize(("first", "last"), [(0, 16), (16, 32), (8, 16)])
def test_rows_that_lie_off_one_after_the_other_are_told_from_noise(lm: LanguageModel, first: int, last: int) -> None:
    """As rows of another prompt do: none of them by much."""
    ids = random_ids(32, seed=4, vocab_size=256)
    seen, louder = lm.capture(input_ids=ids, layer=2), torch.full((len(ids), 1), 0.93)
    louder[first:last] = 1.1
    noise = SIGMA * torch.randn(seen.states.shape, generator=torch.Generator().manual_seed(2))
    for rows, is_told in ((noise, False), (louder * noise, True)):
        found = residuals_of(lm, replace(seen, states=seen.states + rows), ids, NoiseModel.gaussian(SIGMA), Meter())
        assert found.is_noise
        assert [("one after the other" in doubt) for doubt in found.doubts] == [True] * is_told


def test_the_size_of_a_run_does_not_depend_on_that_of_the_noise(lm: LanguageModel) -> None:
    one, other = (residuals_of(lm, _noisy(lm, 2), IDS, NoiseModel.gaussian(s), Meter()) for s in (SIGMA, 2 * SIGMA))
    assert one.in_a_run == pytest.approx(other.in_a_run, abs=1e-6)
    assert max(_of(lm, seed).in_a_run for seed in range(60)) < 4.0


def test_what_doubts_a_prompt_keeps_it_from_being_probable(lm: LanguageModel) -> None:
    found, noise = _of(lm, 1), NoiseModel.gaussian(SIGMA)
    assert verdict_of(_sure(found, noise))[0] == "probable"
    doubted = replace(found, doubts=("row 7 leaves more than noise explains",))
    verdict, reason = verdict_of(_sure(doubted, noise))
    assert verdict == "unmatched"
    assert "row 7" in reason


def _sure(residuals: Residuals, noise: NoiseModel) -> Decoded:
    flat = torch.full((len(IDS), 256), 1 / 256, dtype=torch.float64)
    beams = Beams(input_ids=IDS[None], posteriors=torch.ones(1), token_posteriors=flat, distances=[])
    return Decoded(noise=noise, beams=beams, residuals=residuals, held_out_slope=1.0)
