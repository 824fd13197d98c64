"""Which inverse reads a state, and queries amended by what candidates checked in vain show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sipit import LanguageModel
from sipit.inversion.inverses.correction import Correction
from sipit.inversion.inverses.inverse import queries_of
from sipit.inversion.inverses.log_sum import log_sum_exp
from sipit.inversion.inverses.ridge import amended_query
from sipit.inversion.inverses.ridge_inverse import ridge_inverse
from sipit.inversion.inverses.sampled_ids import frequent_and_other_ids
from sipit.inversion.inverses.sinks import alternative_kind, are_sink_like
from sipit.inversion.judging.meter import Meter
from sipit.observations import Cut
from tests.tiny_models import random_ids, tiny_model


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(33, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def right(states: torch.Tensor) -> torch.Tensor:
    """The query that each state should have."""
    return states @ torch.randn(16, 8, generator=torch.Generator().manual_seed(4))


def test_query_stays_where_the_others_are_right(states: torch.Tensor, right: torch.Tensor) -> None:
    amended = amended_query(states, right, right[1:])
    torch.testing.assert_close(amended, right[0])


@pytest.mark.parametrize("error", ["same everywhere", "linear in the state"])
def test_query_moves_towards_what_the_others_miss(states: torch.Tensor, right: torch.Tensor, error: str) -> None:
    missing = torch.full_like(right, 5.0) if error == "same everywhere" else -right
    amended = amended_query(states, right - missing, right[1:])
    before, after = missing[0].norm(), (amended - right[0]).norm()
    assert after < 0.9 * before


def test_few_alike_states_give_a_finite_query(right: torch.Tensor) -> None:
    alike = torch.ones(5, 16)
    assert torch.isfinite(amended_query(alike, right[:5], right[1:5] + 1)).all()


def test_kinds_of_states_are_told_by_direction_and_doubted_by_length() -> None:
    mean = torch.zeros(16)
    mean[3] = 100.0
    noise = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([0.0, 0.0, 1.0, 0.3, 0.1])  # first, ordinary, a sink, half a sink, less
    states = noise + lengths[:, None] * mean
    assert are_sink_like(states, torch.arange(5), mean, 0.95).tolist() == [True, False, True, True, False]
    assert are_sink_like(states, torch.tensor([3, 1]), mean, 0.95).tolist() == [True, False]
    assert [alternative_kind(states, i, mean, 0.95) for i in range(5)] == [None, None, None, "later", "first"]


@pytest.mark.parametrize(("vocab_size", "n", "n_low"), [(1000, 100, 50), (60, 100, 50), (30, 100, 30)])
def test_tokens_of_a_regression_are_different_and_hold_the_frequent_ones(vocab_size: int, n: int, n_low: int) -> None:
    ids = frequent_and_other_ids(vocab_size, n, torch.Generator().manual_seed(0)).tolist()
    assert len(ids) == len(set(ids)) == min(n, vocab_size)
    assert set(range(n_low)) <= set(ids) <= set(range(vocab_size))


@dataclass
class _Off:
    """An inverse whose queries are all off by the same map of the state."""

    inner: Any
    error: torch.Tensor  # (D, K)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def queries_at(self, observed: torch.Tensor, positions: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        queries: torch.Tensor = self.inner.queries_at(observed, positions, states)
        return queries + states.float() @ self.error


def test_what_an_inverse_gets_wrong_is_learned_from_wrong_tokens_elsewhere() -> None:
    lm, cut = LanguageModel(tiny_model("llama"), name="llama"), Cut(2)
    ids = random_ids(24, seed=3)
    observed = lm.capture(input_ids=ids, layer=2).states
    error = torch.randn(observed.shape[1], 32, generator=torch.Generator().manual_seed(0))
    inverse = _Off(ridge_inverse(lm, cut, Meter()), 0.2 * error)
    correction = Correction(inverse, observed, queries_of(inverse, observed))
    places = list(range(1, 24))
    wanted = inverse.keys.keys(ids[1:])
    before = (correction.queries(places) - wanted).norm(dim=1)
    assert torch.equal(correction.queries(places), queries_of(inverse, observed)[1:])
    row = lm.cut(cut).row()
    for place in range(12):  # other tokens of the first half teach the second
        others = random_ids(8, seed=100 + place)
        correction.note(place, others.tolist(), row.run(others, torch.full((8,), place)))
        row.extend(ids[place : place + 1])
    correction.note(5, [1, 2], torch.full((2, observed.shape[1]), torch.inf))  # states that overflowed teach nothing
    after = (correction.queries(places) - wanted).norm(dim=1)
    assert after[12:].mean() < 0.7 * before[12:].mean()
    assert torch.equal(correction.queries([0]), queries_of(inverse, observed)[:1])  # read by a reading of its own


def test_the_latest_states_alone_are_learned_from() -> None:
    lm, cut = LanguageModel(tiny_model("llama"), name="llama"), Cut(2)
    observed = lm.capture(input_ids=random_ids(6, seed=3), layer=2).states
    inverse = ridge_inverse(lm, cut, Meter())
    corrections = [Correction(inverse, observed, queries_of(inverse, observed)) for _ in range(2)]
    generator = torch.Generator().manual_seed(2)
    for number in range(20):
        states = observed[2] + torch.randn(64, observed.shape[1], generator=generator)
        for correction in corrections[: 2 if number >= 12 else 1]:  # one hears all, the other the last 512
            correction.note(2, random_ids(64, seed=number).tolist(), states)
    all_heard, latest = (correction.queries([1, 2, 5]) for correction in corrections)
    assert torch.equal(all_heard, latest)
    assert not torch.equal(latest, queries_of(inverse, observed)[[1, 2, 5]])


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_sums_of_exponentials_are_those_of_torch(scale: float) -> None:
    logits = scale * torch.randn(5, 1000, generator=torch.Generator().manual_seed(1))
    logits[1, 3:] = -torch.inf
    logits[2] = -torch.inf
    torch.testing.assert_close(log_sum_exp(logits)[[0, 1, 3, 4]], logits.logsumexp(dim=1)[[0, 1, 3, 4]])
    assert float(log_sum_exp(logits)[2]) < -50  # of nothing at all: hardly anything
    torch.testing.assert_close(log_sum_exp(logits[0]), logits[0].logsumexp(dim=0))
