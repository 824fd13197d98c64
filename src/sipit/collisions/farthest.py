"""The farthest pair of rows, exactly: the same leaves and products as the closest, with upper bounds.

Knows nothing of language models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sipit.collisions.nearest import MEMORY, SURE, TILE, NearPair, Panels, squared_distances
from sipit.collisions.panel import Panel, product_error
from sipit.collisions.rows import Block, Rows
from sipit.errors import ShapeError

_SWEEPS = 4
_DECIDED_AT_ONCE = 1 << 12  # pairs


def farthest_pair(blocks: Sequence[Block], *, memory: int = MEMORY) -> NearPair:
    """Return the two rows that lie farthest apart over all blocks, exactly.

    A pair is dropped only where an upper bound of its distance, rounding included, is below the
    largest distance decided so far.

    Args:
        blocks: each (n_rows, d_model), one dtype and device; may be memory-mapped.
        memory: bytes the search may use, about.

    Raises:
        ShapeError, NonFiniteError: as `nearest_pairs`; also with fewer than two rows.
    """
    rows = Rows(blocks)
    if len(rows) < 2:
        raise ShapeError(f"{len(rows)} rows have no farthest pair; pass at least two")
    best = _Farthest(rows)
    panels = Panels(rows, [torch.arange(len(rows))], memory)
    for i in range(panels.count):
        one = panels.load(i)
        for j in range(i, panels.count):
            _search(one, one if i == j else panels.load(j), best)
    return NearPair(first=best.first, second=best.second, distance=best.distance)


class _Farthest:
    """The farthest pair decided so far: at first, of a few sweeps from one row to its farthest."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.first, self.second, self.distance = 0, 1, -1.0
        number = 0
        for _ in range(_SWEEPS):
            origin = rows.take(torch.tensor([number]))
            lengths = [torch.linalg.vector_norm(part.to(origin) - origin, dim=1) for _, part in rows.slices()]
            other = int(torch.cat(lengths).argmax())
            if other != number:
                self.decide(torch.tensor([number]), torch.tensor([other]))
            number = other

    def decide(self, first: Tensor, second: Tensor) -> None:
        distances = self._rows.distances(first, second)
        at = int(distances.argmax())
        if float(distances[at]) > self.distance:
            self.distance = float(distances[at])
            self.first, self.second = sorted((int(first[at]), int(second[at])))


def _search(one: Panel, other: Panel, best: _Farthest) -> None:
    width = one.x.shape[2]
    for i in range(len(one)):
        floor = one.length(best.distance) / SURE
        reaches = other.reaches(one.low[i], one.high[i])
        slack = one.projection_error(one.radius[i]) + other.projection_error(other.radius)
        far = reaches >= floor - slack
        if one is other:
            far[:i] = False
        leaves = far.nonzero()[:, 0]
        if not len(leaves):
            continue
        for part in leaves.split(max(1, TILE // (one.numbers.shape[1] * other.numbers.shape[1]))):
            radii = one.radius[i] + other.radius[part].max()
            squared = squared_distances(one.x[i], one.x_squared[i], other.x[part], other.x_squared[part])
            least = (one.length(best.distance) / SURE - one.rounding_error(radii)).clamp(min=0).square() / SURE
            left = ((squared >= least - product_error(width, radii)) & squared.isfinite()).nonzero()
            order = squared[left[:, 0], left[:, 1]].argsort(descending=True)
            row, column = left[order].cpu().T
            pairs = zip(
                one.numbers[i][row].split(_DECIDED_AT_ONCE),
                other.numbers[part.cpu()].reshape(-1)[column].split(_DECIDED_AT_ONCE),
                strict=True,
            )
            for first, second in pairs:
                if len(first):
                    best.decide(first, second)
