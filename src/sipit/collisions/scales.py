"""How close is close: the closest pairs of some states, beside the scales a distance is judged by.

A distance alone says little: states that are twice as long lie twice as far apart. Each pair is
therefore also given relative to the length of its two states and to the median distance of all pairs.
Knows nothing of language models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.collisions.nearest import NearPair, search_pairs
from sipit.errors import OptionError

THRESHOLD = 1e-6  # L2; arXiv 2510.15511, section 4.1
EXACT_ROWS = 2000  # above this the median is taken over a sample of pairs
_SAMPLED_PAIRS = 200_000


@dataclass(frozen=True, kw_only=True)
class ScaledPair:
    """Two rows, how far apart they lie, and what that amounts to."""

    first: int  # row number, the lower
    second: int
    distance: float  # L2, exact to float64
    relative_to_norm: float | None  # distance / mean norm of the two rows; None if both are zero
    relative_to_median: float | None  # distance / median distance of all pairs; None if that is zero


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """The closest pairs among N rows, and the scales of the whole set. Rows that are not finite take no part."""

    n_rows: int  # finite ones
    n_not_finite: int  # rows left out for NaN or infinity: they have no distance, so they cannot collide
    n_pairs: int  # of finite rows
    n_equal: int  # pairs equal in every value
    n_collisions: int  # pairs at or below the threshold, the equal ones included
    threshold: float  # L2
    mean_norm: float | None  # of the finite rows; None without one
    median_distance: float | None  # of the pairs; None without one
    median_is_exact: bool  # over all pairs, not over a sample of them
    pairs: list[ScaledPair]  # the k closest, by rising distance


def closeness(states: Tensor, *, k: int = 1, threshold: float = THRESHOLD, seed: int = 0) -> Closeness:
    """Return the k closest pairs of rows with their scales. (N, D) → record.

    Args:
        states: of any floating dtype; rows that are not finite are counted and left out.
        k: number of pairs.
        threshold: largest L2 distance counted as a collision.
        seed: of the sample of pairs, where there are more than 2,000 rows.

    Raises:
        OptionError: k is less than 1, or the threshold is negative.
    """
    if k < 1 or not threshold >= 0:
        raise OptionError(f"need k of 1 or more and a threshold of 0 or more, got k {k} and threshold {threshold}")
    is_finite = torch.isfinite(states).all(dim=1)
    numbers = is_finite.nonzero()[:, 0].tolist()
    finite = states[is_finite]  # (n, D)
    n_rows, n_pairs = len(numbers), len(numbers) * (len(numbers) - 1) // 2
    near = search_pairs([finite], k=k, within=threshold) if n_pairs else None
    norms = torch.cat([part.double().norm(dim=1) for part in finite.split(4096)]) if n_rows else torch.empty(0)
    median = median_distance(finite, seed=seed) if n_pairs else None
    return Closeness(
        n_rows=n_rows,
        n_not_finite=len(states) - n_rows,
        n_pairs=n_pairs,
        n_equal=near.n_equal if near else 0,
        n_collisions=near.n_collisions if near else 0,
        threshold=threshold,
        mean_norm=float(norms.mean()) if n_rows else None,
        median_distance=median,
        median_is_exact=n_rows <= EXACT_ROWS,
        pairs=[
            replace(pair, first=numbers[pair.first], second=numbers[pair.second])
            for pair in scaled_pairs(near.pairs if near else (), norms, median)
        ],
    )


def scaled_pairs(pairs: Sequence[NearPair], norms: Tensor, median: float | None) -> tuple[ScaledPair, ...]:
    """Return pairs beside the norms of their rows (N,) and the median distance of all pairs."""
    return tuple(
        ScaledPair(
            first=pair.first,
            second=pair.second,
            distance=pair.distance,
            relative_to_norm=ratio(pair.distance, float(norms[pair.first] + norms[pair.second]) / 2),
            relative_to_median=ratio(pair.distance, median),
        )
        for pair in pairs
    )


def median_distance(states: Tensor, *, seed: int = 0) -> float:
    """Return the median L2 distance of the pairs of rows: exact up to 2,000 rows, else of a seeded sample of pairs.

    (N, D), N ≥ 2. Float64 differences; the mean of the middle two where the number of pairs is even.
    """
    n_rows = len(states)
    if n_rows <= EXACT_ROWS:
        wide = states.double()
        found = torch.cat([(wide[i + 1 :] - wide[i]).norm(dim=1) for i in range(n_rows - 1)])
    else:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(n_rows, (_SAMPLED_PAIRS,), generator=generator)
        second = (first + torch.randint(1, n_rows, (_SAMPLED_PAIRS,), generator=generator)) % n_rows  # another row
        chosen = zip(first.split(4096), second.split(4096), strict=True)
        found = torch.cat([(states[a].double() - states[b].double()).norm(dim=1) for a, b in chosen])
    found = found.sort().values
    return float(found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2


def ratio(value: float, unit: float | None) -> float | None:
    """Return value / unit, or None where that says nothing."""
    return value / unit if unit else None
