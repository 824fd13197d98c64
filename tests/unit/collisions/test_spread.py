"""Farthest pair and distribution of distances, against all pairs computed one by one."""

from __future__ import annotations

import pytest
import torch

from sipit.collisions import farthest_pair, full_spread, panel, sampled_spread
from sipit.collisions.rows import Rows
from sipit.errors import ShapeError
from tests.unit.collisions.test_nearest import SMALL, brute, clustered


@pytest.mark.parametrize("memory", [1 << 31, SMALL])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_farthest_pair_equals_brute_force(offset: float, memory: int) -> None:
    rows = clustered(800, 20, offset=offset)
    distance, first, second = brute(rows, 10**6)[-1]
    pair = farthest_pair([rows[:100], rows[100:]], memory=memory)
    assert (pair.first, pair.second) == (first, second)
    assert pair.distance == pytest.approx(distance, rel=1e-12)


def test_spread_of_few_rows_is_of_all_pairs() -> None:
    rows = clustered(120, 6)
    distances = torch.tensor([d for d, _, _ in brute(rows, 10**6)])
    spread = sampled_spread([rows])
    assert (spread.is_sampled, spread.n_pairs, spread.n_covered) == (False, 7140, 7140)
    assert spread.median == pytest.approx(float(distances.median()), rel=1e-2)
    assert (spread.least, spread.most) == pytest.approx((float(distances[0]), float(distances[-1])), rel=1e-6)
    assert sum(spread.counts) == 7140
    assert len(spread.edges) == len(spread.counts) + 1


def test_sampled_spread_says_so_and_comes_near_the_full_one() -> None:
    rows = clustered(1000, 6)
    full = full_spread([rows[:10], rows[10:]], farthest=farthest_pair([rows]).distance)
    sampled = sampled_spread([rows], n_pairs=50_000)
    assert (sampled.is_sampled, full.is_sampled) == (True, False)
    assert (full.n_pairs, full.n_covered, sampled.n_covered) == (499_500, 499_500, 499_500)
    assert sampled.mean == pytest.approx(full.mean, rel=0.01)
    for (_, one), (_, other) in zip(sampled.percentiles[3:], full.percentiles[3:], strict=True):
        assert one == pytest.approx(other, rel=0.05)


def test_full_spread_equals_all_pairs() -> None:
    rows = clustered(300, 6, offset=100.0)
    distances = torch.tensor([d for d, _, _ in brute(rows, 10**6)], dtype=torch.float64)
    spread = full_spread([rows], farthest=float(distances[-1]))
    assert spread.mean == pytest.approx(float(distances.mean()), rel=1e-9)
    assert spread.least == pytest.approx(float(distances[0]), rel=1e-6)
    assert spread.most == pytest.approx(float(distances[-1]), rel=1e-9)
    assert spread.median == pytest.approx(float(distances.median()), rel=1e-3)
    inner = int(((distances >= spread.edges[3]) & (distances < spread.edges[4])).sum())
    assert abs(spread.counts[3] - inner) <= 2


def test_equal_rows_have_a_spread_of_zeros() -> None:
    spread = sampled_spread([torch.ones(5, 3)])
    assert (spread.most, spread.median, sum(spread.counts)) == (0.0, 0.0, 10)


def test_one_row_has_no_distances() -> None:
    for measure in (farthest_pair, sampled_spread):
        with pytest.raises(ShapeError, match="at least two"):
            measure([torch.ones(1, 3)])


def test_boxes_bound_distances_from_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "_LEAF", 1)  # boxes of single rows: the bounds are tight
    rows = Rows([torch.randn(60, 90, generator=torch.Generator().manual_seed(2))])  # half of each row lies off them
    frame = panel.frame_of(rows)
    placed = panel.Panel(rows, torch.arange(60), frame)
    for i in range(len(placed)):
        nearest, farthest = placed.gaps(placed.low[i], placed.high[i]), placed.reaches(placed.low[i], placed.high[i])
        for j in range(len(placed)):
            one, other = (rows.take(placed.numbers[n][placed.numbers[n] >= 0]) * frame.scale for n in (i, j))
            if not len(one) or not len(other):
                continue  # a leaf of empty places
            distances = (one[:, None] - other[None]).norm(dim=2)
            assert float(nearest[j]) <= float(distances.min()) + 1e-6
            assert float(farthest[j]) >= float(distances.max()) - 1e-6
