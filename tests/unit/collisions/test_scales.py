"""Scales and counts of a set of states are those of a plain double loop in float64."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from torch import Tensor

from sipit.collisions import scales
from sipit.collisions.scales import closeness, median_distance
from sipit.errors import OptionError


def _rows(n: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def _gaps(rows: Tensor) -> dict[tuple[int, int], float]:
    values = rows.double().tolist()
    return {
        (i, j): sum((a - b) ** 2 for a, b in zip(values[i], values[j], strict=True)) ** 0.5
        for i, j in itertools.combinations(range(len(values)), 2)
    }


@pytest.mark.parametrize("n", [2, 3, 4, 11])
def test_closeness_is_that_of_a_double_loop(n: int) -> None:
    rows = _rows(n) + 3
    gaps = _gaps(rows)
    threshold = statistics.median_low(gaps.values())
    found = closeness(rows, k=3, threshold=threshold * (1 + 1e-12))
    norms = rows.double().norm(dim=1).tolist()
    for pair, (places, gap) in zip(found.pairs, sorted(gaps.items(), key=lambda item: item[1]), strict=False):
        assert (pair.first, pair.second) == places
        assert pair.distance == pytest.approx(gap, rel=1e-12)
        assert pair.relative_to_norm == pytest.approx(2 * gap / (norms[places[0]] + norms[places[1]]), rel=1e-12)
        assert pair.relative_to_median == pytest.approx(gap / statistics.median(gaps.values()), rel=1e-12)
    assert len(found.pairs) == min(3, len(gaps))
    assert found.n_collisions == sum(gap <= threshold * (1 + 1e-12) for gap in gaps.values())
    assert found.median_distance == pytest.approx(statistics.median(gaps.values()), rel=1e-12)
    assert found.mean_norm == pytest.approx(statistics.fmean(norms), rel=1e-12)
    assert (found.n_rows, found.n_pairs, found.n_equal, found.n_not_finite) == (n, len(gaps), 0, 0)


def test_rows_that_are_not_finite_take_no_part_and_keep_their_numbers() -> None:
    rows = _rows(6)
    rows[1, 2], rows[4, 0] = float("nan"), float("-inf")
    rows[5] = rows[3]
    found = closeness(rows)
    assert (found.n_not_finite, found.n_rows, found.n_pairs) == (2, 4, 6)
    assert (found.pairs[0].first, found.pairs[0].second, found.n_equal) == (3, 5, 1)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows_have_no_closest_pair(n: int) -> None:
    found = closeness(_rows(n))
    assert (found.pairs, found.median_distance, found.n_collisions) == ([], None, 0)


def test_scales_of_zero_states_are_null() -> None:
    found = closeness(torch.zeros(3, 4))
    assert (found.n_equal, found.n_collisions, found.pairs[0].distance) == (3, 3, 0.0)
    assert found.pairs[0].relative_to_norm is None
    assert found.pairs[0].relative_to_median is None


def test_sampled_median_is_near_the_exact_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(80)
    exact = median_distance(rows)
    monkeypatch.setattr(scales, "EXACT_ROWS", 79)
    assert median_distance(rows) == pytest.approx(exact, rel=0.02)
    assert median_distance(rows) == median_distance(rows)
    assert not closeness(rows).median_is_exact


def test_bad_options_are_refused() -> None:
    for options in ({"k": 0}, {"threshold": -1.0}, {"threshold": float("nan")}):
        with pytest.raises(OptionError, match="need k of 1"):
            closeness(_rows(3), **options)
