"""How far apart rows lie in general: percentiles, mean and histogram of the distances of all pairs, or of a sample.

Knows nothing of language models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.collisions.rows import Block, Rows
from sipit.errors import OptionError, ShapeError

PERCENTILES = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)
_BINS = 50
_FINE_BINS = 1 << 16  # of the full distribution: what its percentiles are read from
_TILE_ROWS = 1024
_AT_ONCE = 1 << 13  # pairs


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The distribution of the distances between rows."""

    n_covered: int  # pairs of rows there are
    n_pairs: int  # pairs these figures are of
    is_sampled: bool  # whether they are a random sample of all pairs
    percentiles: tuple[tuple[float, float], ...]  # (per cent, L2 distance)
    mean: float  # L2
    least: float  # of these pairs; the exact closest of all pairs is another figure where they are a sample
    most: float
    edges: tuple[float, ...]  # of the histogram, L2; one more than counts
    counts: tuple[int, ...]

    @property
    def median(self) -> float:
        """The distance that half of the pairs stay below."""
        return dict(self.percentiles)[50]


def sampled_spread(blocks: Sequence[Block], *, n_pairs: int = 200_000, seed: int = 0) -> Spread:
    """Return the distribution of distances over pairs drawn at random; of all pairs where they are no more.

    Args:
        blocks: each (n_rows, d_model).
        n_pairs: how many to draw, with replacement.
        seed: of the draw.

    Raises:
        ShapeError, NonFiniteError: as `nearest_pairs`; also with fewer than two rows.
    """
    rows = _two_rows(blocks)
    if n_pairs < 1:
        raise OptionError(f"n_pairs is {n_pairs}; draw at least 1 pair")
    is_sampled = rows.n_pairs > n_pairs
    if is_sampled:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(len(rows), (n_pairs,), generator=generator)
        second = (first + torch.randint(1, len(rows), (n_pairs,), generator=generator)) % len(rows)
    else:
        first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    parts = zip(first.split(_AT_ONCE), second.split(_AT_ONCE), strict=True)
    distances = torch.cat([rows.distances(a, b) for a, b in parts]).sort().values
    most = float(distances[-1])
    counts = distances.histc(_BINS, 0.0, most or 1.0)
    places = (torch.tensor(PERCENTILES, dtype=torch.float64) / 100 * (len(distances) - 1)).round().long()
    return Spread(
        n_covered=rows.n_pairs,
        n_pairs=len(distances),
        is_sampled=is_sampled,
        percentiles=tuple(zip(PERCENTILES, distances[places].tolist(), strict=True)),
        mean=float(distances.mean()),
        least=float(distances[0]),
        most=most,
        edges=tuple(torch.linspace(0, most or 1.0, _BINS + 1, dtype=torch.float64).tolist()),
        counts=tuple(int(c) for c in counts.tolist()),
    )


def full_spread(blocks: Sequence[Block], *, farthest: float) -> Spread:
    """Return the distribution of distances over all pairs.

    Distances come from float64 products about the mean row: exact to about 1e-8 of the largest norm,
    enough for a histogram and not for a collision. Percentiles are read from 65,536 bins.

    Args:
        blocks: each (n_rows, d_model).
        farthest: a distance that no pair exceeds, as of `farthest_pair`.
    """
    rows = _two_rows(blocks)
    top = farthest * (1 + 1e-9) or 1.0
    fine = torch.zeros(_FINE_BINS, dtype=torch.float64)
    total, least, most = 0.0, torch.inf, 0.0
    for distances in _all_distances(rows):
        fine += distances.histc(_FINE_BINS, 0.0, top).cpu()
        total += float(distances.sum())
        least, most = min(least, float(distances.min())), max(most, float(distances.max()))
    below = fine.cumsum(0)
    places = torch.searchsorted(below, torch.tensor(PERCENTILES, dtype=torch.float64) / 100 * below[-1])
    width = top / _FINE_BINS
    coarse = torch.stack([part.sum() for part in fine.tensor_split(_BINS)])
    starts = [0, *torch.tensor([len(part) for part in fine.tensor_split(_BINS)]).cumsum(0).tolist()]
    return Spread(
        n_covered=rows.n_pairs,
        n_pairs=int(below[-1]),
        is_sampled=False,
        percentiles=tuple((p, (int(i) + 0.5) * width) for p, i in zip(PERCENTILES, places, strict=True)),
        mean=total / float(below[-1]),
        least=least,
        most=most,
        edges=tuple(start * width for start in starts),
        counts=tuple(int(c) for c in coarse.tolist()),
    )


def _two_rows(blocks: Sequence[Block]) -> Rows:
    rows = Rows(blocks)
    if len(rows) < 2:
        raise ShapeError(f"{len(rows)} rows have no distances; pass at least two")
    return rows


def _all_distances(rows: Rows) -> Iterator[Tensor]:
    """Yield the distances of all pairs, a tile at a time. (n,) float64 each."""
    numbers = torch.arange(len(rows))
    mean = torch.stack([part.double().sum(dim=0) for _, part in rows.slices()]).sum(dim=0) / len(rows)
    for i, first in enumerate(numbers.split(_TILE_ROWS)):
        a = rows.take(first) - mean
        for second in numbers[i * _TILE_ROWS :].split(_TILE_ROWS):
            b = rows.take(second) - mean
            squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * (a @ b.T)
            distances = squared.clamp_(min=0).sqrt_()
            if int(second[0]) == int(first[0]):
                distances = distances[tuple(torch.triu_indices(len(a), len(a), offset=1))]
            if distances.numel():
                yield distances.reshape(-1)
