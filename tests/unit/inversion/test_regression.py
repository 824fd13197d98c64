"""Which inverse reads a state, and queries amended by what candidates checked in vain show."""

from __future__ import annotations

import pytest
import torch

from sipit.inversion.inverses.ridge import amended_query
from sipit.inversion.inverses.sampled_ids import frequent_and_other_ids
from sipit.inversion.inverses.sinks import alternative_kind, is_sink_like, is_sink_like_at


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
    assert is_sink_like(states, mean, 0.95).tolist() == [True, False, True, True, False]
    assert [is_sink_like_at(states, i, mean, 0.95) for i in range(5)] == [True, False, True, True, False]
    assert [alternative_kind(states, i, mean, 0.95) for i in range(5)] == [None, None, None, "later", "first"]


@pytest.mark.parametrize(("vocab_size", "n", "n_low"), [(1000, 100, 50), (60, 100, 50), (30, 100, 30)])
def test_tokens_of_a_regression_are_different_and_hold_the_frequent_ones(vocab_size: int, n: int, n_low: int) -> None:
    ids = frequent_and_other_ids(vocab_size, n, torch.Generator().manual_seed(0)).tolist()
    assert len(ids) == len(set(ids)) == min(n, vocab_size)
    assert set(range(n_low)) <= set(ids) <= set(range(vocab_size))
