"""How much a decoding tries: a token that every ranking puts last is found where the whole vocabulary is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sipit
from sipit import LanguageModel, Observation
from sipit.inversion import NoiseModel
from sipit.inversion.judging.meter import Meter
from sipit.inversion.noise.beam_search import BeamSearch
from sipit.inversion.noise.effort import Effort, effort_on
from sipit.inversion.noise.token_ranking import TokenRanking
from tests.tiny_models import random_ids, text_model

LAYER = 2
IDS = random_ids(8, seed=3, vocab_size=256)
HIDDEN = 5  # the row whose token the rankings put last
LITTLE = Effort(n_beams=4, n_shown=8, n_candidates=(8, 8), n_surprised=0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model()


@pytest.fixture
def seen(lm: LanguageModel) -> Observation:
    own = lm.capture(input_ids=IDS, layer=LAYER)
    return replace(
        own, states=own.states + 0.3 * torch.randn(own.states.shape, generator=torch.Generator().manual_seed(0))
    )


def _with_last(usual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a ranking in which the hidden token has no likelihood."""

    def ranked(self: TokenRanking, row: Tensor, *rest: Any) -> Tensor:
        scores = usual(self, row, *rest)
        ids = rest[1] if scores.dim() == 2 else torch.arange(scores.shape[-1])
        scores[..., ids == int(IDS[HIDDEN])] = -1e9
        return scores

    return ranked


@pytest.mark.parametrize(("whole", "is_found"), [("never", False), ("in doubt", True), ("always", True)])
def test_a_token_that_no_ranking_proposes(
    lm: LanguageModel, seen: Observation, monkeypatch: pytest.MonkeyPatch, whole: Any, is_found: bool
) -> None:
    for name in ("at_first", "sharpened", "by_map"):
        monkeypatch.setattr(TokenRanking, name, _with_last(getattr(TokenRanking, name)))
    monkeypatch.setattr("sipit.inversion.noise.beam_search._EXPECTED", 1)
    meter = Meter()
    search = BeamSearch(lm, seen, NoiseModel.gaussian(0.3), meter, replace(LITTLE, whole=whole))
    found = search.run().input_ids[0]
    assert (int(found[HIDDEN]) == int(IDS[HIDDEN])) is is_found
    n_whole = meter.n_checked // lm.vocab_size
    assert (n_whole == 0) is (whole == "never")
    assert (n_whole >= len(IDS) - 1) is (whole == "always")


def test_posteriors_over_the_whole_vocabulary_are_those_of_a_usual_search(lm: LanguageModel, seen: Observation) -> None:
    noise = NoiseModel.gaussian(0.3)
    usual, whole = (BeamSearch(lm, seen, noise, Meter(), Effort(whole=w)).run() for w in ("never", "always"))
    assert torch.equal(usual.input_ids[0], whole.input_ids[0])
    assert torch.allclose(usual.posteriors[0], whole.posteriors[0], atol=0.01)
    assert torch.allclose(usual.token_posteriors.sum(dim=1), whole.token_posteriors.sum(dim=1))


def test_a_gpu_runs_more_at_once_and_the_vocabulary_in_doubt() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (effort_on(cpu).whole, effort_on(gpu).whole) == ("never", "in doubt")
    assert {effort_on(each, is_whole=True).whole for each in (cpu, gpu)} == {"always"}
    assert {effort_on(each, is_quick=True, is_whole=True).whole for each in (cpu, gpu)} == {"never"}
    assert effort_on(gpu, is_quick=True).max_batch == effort_on(gpu).max_batch > effort_on(cpu).max_batch


def test_exhaustive_asks_for_it(lm: LanguageModel, seen: Observation) -> None:
    counts = [
        sipit.invert(lm, seen, noise=NoiseModel.gaussian(0.3), exhaustive=each).n_checked for each in (False, True)
    ]
    assert counts[1] > counts[0] + 256 * (len(IDS) - 2)
