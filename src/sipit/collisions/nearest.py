"""The closest pairs of rows, exactly: screen by proven lower bounds, decide by float64 differences.

Knows nothing of language models. Three screens, each cheaper than the next: boxes around leaves of
near rows, matrix products of projections on the main directions, matrix products of whole rows. A
pair is dropped only where a lower bound of its distance, rounding included, exceeds the k-th best
distance decided so far; each pair that is left is decided by the difference of its stored values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.collisions.equal import equal_groups, n_equal_pairs
from sipit.collisions.panel import Frame, Panel, frame_of, longest_of, panel_bytes, product_error, rounding_of
from sipit.collisions.rows import Block, Rows, blocks_in
from sipit.errors import OptionError

MEMORY = 2 << 30  # bytes

TILE = 1 << 21  # pairs screened at a time
_DECIDED_AT_ONCE = 1 << 23  # numbers
_DENSE = 1 / 128  # of a tile left by the projections: then whole rows are multiplied, which costs less than deciding
SURE = 1 + 1e-6  # for the roundings of the limits themselves

OnStep = Callable[[int, int], None]  # pairs covered, in all


@dataclass(frozen=True, kw_only=True)
class NearPair:
    """Two rows and how far apart they lie."""

    first: int  # row number, the lower one
    second: int  # row number
    distance: float  # L2, in units of the rows, by float64 differences


@dataclass(frozen=True, kw_only=True)
class PairSearch:
    """The closest pairs, and what finding them took."""

    pairs: tuple[NearPair, ...]  # by rising distance
    n_rows: int
    n_covered: int  # pairs of rows the answer is about
    n_projected: int  # pairs whose projections were compared
    n_multiplied: int  # pairs whose whole rows were multiplied
    n_decided: int  # pairs whose float64 distance was computed
    n_equal: int  # pairs equal in every value
    n_collisions: int  # pairs at distance <= `within`, equal ones included


def nearest_pairs(blocks: Sequence[Block], *, k: int = 1) -> list[NearPair]:
    """Return the k closest pairs of rows over all blocks, exactly.

    Decides by float64 differences: the matrix-product form loses every digit when
    ||x - y|| << ||x||, which is where a collision would be. Ties go to the lower row numbers.

    Args:
        blocks: each (n_rows, d_model), one dtype and device; may be memory-mapped. Tensors, numpy arrays, or lists
            of lists of numbers, which are taken as float64.
        k: number of pairs; all of them where there are fewer.

    Returns:
        Pairs by rising L2 distance, in units of the rows; global row numbers, lower first. Distances that float64
        cannot hold are infinity, and come last.

    Raises:
        ShapeError: a block is no array, is not two-dimensional, or its width differs.
        NonFiniteError: a row holds NaN or infinity.
        OptionError: k is below 1.

    Source: arXiv 2510.15511, section 4.1.
    """
    return list(search_pairs(blocks, k=k).pairs)


def search_pairs(
    blocks: Sequence[Block],
    *,
    k: int = 1,
    within: float = 0.0,
    memory: int = MEMORY,
    on_step: OnStep | None = None,
) -> PairSearch:
    """Return the k closest pairs over all blocks with the cost of finding them; see `nearest_pairs`.

    Args:
        within: count the pairs at this distance or nearer, however many they are.
        memory: bytes the search may use, about; more rows than fit are searched a panel at a time.
        on_step: told the pairs covered so far and in all.
    """
    _check_options(k, within, memory)
    rows = Rows(blocks)
    groups = equal_groups(rows) if len(rows) > 1 else []
    is_first = torch.ones(len(rows), dtype=torch.bool)
    for group in groups:
        is_first[group[1:]] = False
    numbers = is_first.nonzero()[:, 0]  # one of each group of equal rows
    best = _Best(rows, k, within, _weights(len(rows), groups))
    panels = Panels(rows, [numbers], memory)
    n_steps = panels.count * (panels.count + 1) // 2
    step = 0
    for i in range(panels.count):
        one = panels.load(i)
        for j in range(i, panels.count):
            _search(one, one if i == j else panels.load(j), best)
            step += 1
            if on_step is not None:
                on_step(rows.n_pairs * step // n_steps, rows.n_pairs)
    n_equal = n_equal_pairs(groups)
    return PairSearch(
        pairs=tuple(_expanded(best.pairs(), groups, k)),
        n_rows=len(rows),
        n_covered=rows.n_pairs,
        n_projected=best.n_projected,
        n_multiplied=best.n_multiplied,
        n_decided=best.n_decided,
        n_equal=n_equal,
        n_collisions=best.n_collisions + n_equal,
    )


def search_between(
    left: Sequence[Block],
    right: Sequence[Block],
    *,
    k: int = 1,
    within: float = 0.0,
    memory: int = MEMORY,
) -> PairSearch:
    """Return the k closest pairs of a row of `left` and a row of `right`, exactly; see `search_pairs`.

    Row numbers count on from the last row of `left`. Equal rows are pairs like any other here.
    """
    _check_options(k, within, memory)
    lefts = blocks_in(left)
    rows = Rows([*lefts, *blocks_in(right)])
    n_left = rows.before(len(lefts))
    ones = torch.arange(n_left), torch.arange(n_left, len(rows))
    best = _Best(rows, k, within, torch.ones(len(rows), dtype=torch.long))
    panels = Panels(rows, ones, memory)
    for i in range(panels.count):
        if panels.side(i) == 0:
            one = panels.load(i)
            for j in range(panels.count):
                if panels.side(j) == 1:
                    _search(one, panels.load(j), best)
    pairs = best.pairs()
    return PairSearch(
        pairs=tuple(pairs),
        n_rows=len(rows),
        n_covered=n_left * (len(rows) - n_left),
        n_projected=best.n_projected,
        n_multiplied=best.n_multiplied,
        n_decided=best.n_decided,
        n_equal=best.n_zero,
        n_collisions=best.n_collisions,
    )


class Panels:
    """Rows in as many panels as the memory asks for; two are held at a time."""

    def __init__(self, rows: Rows, sides: Sequence[Tensor], memory: int) -> None:
        self._rows = rows
        self._frame: Frame = frame_of(rows)
        n_rows = sum(len(side) for side in sides)
        fits = max(64, memory // panel_bytes(rows.width))
        size = fits if n_rows <= fits else max(32, fits // 2)
        self._parts = [(s, part) for s, side in enumerate(sides) for part in side.split(size) if len(part)]

    @property
    def count(self) -> int:
        return len(self._parts)

    def side(self, i: int) -> int:
        return self._parts[i][0]

    def load(self, i: int) -> Panel:
        return Panel(self._rows, self._parts[i][1], self._frame)


class _Best:
    """The closest pairs decided so far, and the limit that a pair must reach to matter."""

    def __init__(self, rows: Rows, k: int, within: float, weights: Tensor) -> None:
        self.rows = rows
        self.k = k
        self.bound = torch.inf  # proven: k pairs are at most this far apart
        self.n_projected = self.n_multiplied = self.n_decided = self.n_collisions = self.n_zero = 0
        self._within = within
        self._weights = weights  # (N,) number of rows equal to each
        self._first = torch.empty(0, dtype=torch.long)
        self._second = torch.empty(0, dtype=torch.long)
        self._distances = torch.empty(0, dtype=torch.float64)

    @property
    def limit(self) -> float:
        """Distance above which a pair need not be decided."""
        return max(self.bound, self._within)

    def decide(self, first: Tensor, second: Tensor) -> None:
        """Compute distances, count, and keep the k best. (n,), (n,) row numbers."""
        first, second = torch.minimum(first, second), torch.maximum(first, second)
        distances = self.rows.distances(first, second)
        self.n_decided += len(first)
        near = distances <= self._within
        self.n_collisions += int((self._weights[first[near]] * self._weights[second[near]]).sum())
        self.n_zero += int((distances == 0).sum())
        worth = distances <= self.bound
        self._first = torch.cat([self._first, first[worth]])
        self._second = torch.cat([self._second, second[worth]])
        self._distances = torch.cat([self._distances, distances[worth]])
        order = self._second.argsort(stable=True)
        order = order[self._first[order].argsort(stable=True)]
        order = order[self._distances[order].argsort(stable=True)][: self.k]
        self._first, self._second, self._distances = self._first[order], self._second[order], self._distances[order]
        if len(order) == self.k:
            self.bound = min(self.bound, float(self._distances[-1]))

    def pairs(self) -> list[NearPair]:
        """Return what was kept, by rising distance."""
        kept = zip(self._first.tolist(), self._second.tolist(), self._distances.tolist(), strict=True)
        return [NearPair(first=i, second=j, distance=d) for i, j, d in kept]


def _search(one: Panel, other: Panel, best: _Best) -> None:
    """Decide every pair of a row of one panel and a row of the other that may matter."""
    if best.bound == torch.inf:
        best.bound = _first_bound(one, other, best)
    for i in range(len(one)):
        reach = one.length(best.limit)
        gaps = other.gaps(one.low[i], one.high[i])  # (L,)
        slack = one.projection_error(one.radius[i]) + other.projection_error(other.radius)
        near = gaps <= reach * SURE + slack
        if one is other:
            near[:i] = False
        leaves = near.nonzero()[:, 0]
        if not len(leaves):
            continue
        leaves = leaves[gaps[leaves].argsort()]  # the nearest first: they tighten the limit for the rest
        size = max(1, TILE // (one.numbers.shape[1] * other.numbers.shape[1]))
        for part in leaves.split(size):
            for first, second in _left_over(one, i, other, part, best):
                best.decide(first, second)


def _left_over(one: Panel, i: int, other: Panel, leaves: Tensor, best: _Best) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pairs of rows of leaf i and of some leaves that the screens leave, the nearest first."""
    n_pairs = one.numbers.shape[1] * len(leaves) * other.numbers.shape[1]
    if one is other and bool((leaves == i).any()):
        n_pairs -= one.numbers.shape[1] * (one.numbers.shape[1] + 1) // 2  # each pair of the leaf itself once
    best.n_projected += n_pairs
    slack = one.projection_error(one.radius[i]) + other.projection_error(other.radius[leaves])  # (l,)
    screen = _Screen(one.z[i], one.is_empty[i], other.z[leaves], other.is_empty[leaves], slack)
    left = screen.left(one.length(best.limit))
    if len(left) > n_pairs * _DENSE:
        best.n_multiplied += n_pairs
        slack = one.rounding_error(one.radius[i] + other.radius[leaves])
        screen = _Screen(one.x[i], one.is_empty[i], other.x[leaves], other.is_empty[leaves], slack)
        left = screen.left(one.length(best.limit))
    row, column = left.T
    size = other.numbers.shape[1]
    place = torch.div(column, size, rounding_mode="floor")  # (n,) of the other row's leaf among `leaves`
    if one is other:  # within the leaf itself, each pair once
        once = (leaves[place] != i) | (row < column % size)
        row, column, place = row[once], column[once], place[once]
    values = screen.squared[row, column]
    order = values.argsort()
    row, column, place, values = row[order], column[order], place[order], values[order]
    at_once, most = 64, max(64, _DECIDED_AT_ONCE // one.x.shape[2])
    while len(row):
        near = values <= screen.limits(one.length(best.limit))[place]  # the limit may have fallen
        row, column, place, values = row[near], column[near], place[near], values[near]
        if len(row):
            first = one.numbers[i][row[:at_once].cpu()]
            yield first, other.numbers[leaves.cpu()].reshape(-1)[column[:at_once].cpu()]
        row, column, place, values = row[at_once:], column[at_once:], place[at_once:], values[at_once:]
        at_once = min(8 * at_once, most)


class _Screen:
    """Squared distances of the rows of a leaf to those of others by products about the leaf's own mean.

    Near rows lie near that mean, so the products' errors are as small as the leaf, however long its
    rows are. S rows of a leaf, l other leaves.
    """

    def __init__(self, a: Tensor, a_empty: Tensor, b: Tensor, b_empty: Tensor, slack: Tensor) -> None:
        mean = a.mean(dim=0)
        a, b = a - mean, b - mean  # (S, D), (l, S, D)
        a_squared, b_squared = a.square().sum(dim=1), b.square().sum(dim=2)
        width = a.shape[1]
        radii = longest_of(a_squared.max(), width) + longest_of(b_squared.amax(dim=1), width)  # (l,)
        self._slack = slack + rounding_of(radii)  # of the rows themselves, and of taking the mean away
        self._error = product_error(width, radii)
        a_squared, b_squared = a_squared.masked_fill(a_empty, torch.inf), b_squared.masked_fill(b_empty, torch.inf)
        self.squared = squared_distances(a, a_squared, b, b_squared)  # (S, l S)

    def limits(self, limit: float) -> Tensor:
        """Return what the squared distance of a pair within the limit may come to, for each other leaf. (l,)."""
        return (limit * SURE + self._slack).square() * SURE + self._error

    def left(self, limit: float) -> Tensor:
        """Return the row and column of the pairs that may be within the limit. (n, 2)."""
        limits = self.limits(limit).repeat_interleave(self.squared.shape[1] // len(self._slack))
        near = self.squared <= limits
        if not bool(limits.isfinite().all()):
            near &= self.squared.isfinite()  # empty places stay out
        return near.nonzero()


def squared_distances(a: Tensor, a_squared: Tensor, b: Tensor, b_squared: Tensor) -> Tensor:
    """Return |a|² + |b|² - 2ab. (S, D), (S,), (l, S, D), (l, S) → (S, l S)."""
    flat = b.reshape(-1, b.shape[2])
    return torch.addmm(b_squared.reshape(1, -1), a, flat.T, alpha=-2).add_(a_squared[:, None])


def _first_bound(one: Panel, other: Panel, best: _Best) -> float:
    """Return a distance that k pairs stay below, from the nearest rows of each leaf and its nearest leaf."""
    size = one.numbers.shape[1] * other.numbers.shape[1]
    wanted = min(size, 1 + -(-2 * best.k // len(one)))
    first, second = [], []
    for i in range(len(one)):
        j = i if one is other else int(other.gaps(one.low[i], one.high[i]).argmin())
        squared = squared_distances(one.x[i], one.x_squared[i], other.x[j : j + 1], other.x_squared[j : j + 1])
        if one is other:
            squared = squared.masked_fill_(torch.ones_like(squared, dtype=torch.bool).tril(), torch.inf)
        values, flat = squared.reshape(-1).topk(wanted, largest=False)
        flat = flat[values.isfinite()].cpu()
        first.append(one.numbers[i][torch.div(flat, squared.shape[1], rounding_mode="floor")])
        second.append(other.numbers[j][flat % squared.shape[1]])
    rows_a, rows_b = torch.cat(first), torch.cat(second)
    if len(rows_a) < best.k:
        return torch.inf
    parts = zip(rows_a.split(4096), rows_b.split(4096), strict=True)
    distances = torch.cat([best.rows.distances(a, b) for a, b in parts])
    return float(distances.kthvalue(best.k).values)


def _weights(n_rows: int, groups: list[Tensor]) -> Tensor:
    """Return how many rows equal the first row of each group, itself included. (N,)."""
    weights = torch.ones(n_rows, dtype=torch.long)
    for group in groups:
        weights[group[0]] = len(group)
    return weights


def _expanded(pairs: list[NearPair], groups: list[Tensor], k: int) -> list[NearPair]:
    """Return the k closest pairs of rows, given those of one row of each group of equal ones."""
    members = {int(group[0]): group[: k + 1].tolist() for group in groups}
    found: list[tuple[float, int, int]] = []
    for group in members.values():
        equal = ((0.0, group[a], group[b]) for a in range(len(group)) for b in range(a + 1, len(group)))
        found += [pair for pair, _ in zip(equal, range(k), strict=False)]
        if len(found) > 4 * k:
            found = sorted(found)[:k]
    for pair in pairs:
        firsts, seconds = members.get(pair.first, [pair.first]), members.get(pair.second, [pair.second])
        alike = ((pair.distance, min(a, b), max(a, b)) for a in firsts for b in seconds)
        found += sorted(alike)[:k]
    return [NearPair(first=i, second=j, distance=d) for d, i, j in sorted(found)[:k]]


def _check_options(k: int, within: float, memory: int) -> None:
    if k < 1:
        raise OptionError(f"k is {k}; ask for at least 1 pair")
    if not 0 <= within < float("inf"):
        raise OptionError(f"within is {within}; it is an L2 distance, 0 or more")
    if memory < 1 << 20:
        raise OptionError(f"memory is {memory} bytes; a search needs at least {1 << 20}")
