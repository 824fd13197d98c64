"""One packed pass as a tree: candidates for the next position, guesses behind them, and behind those.

A wrong guess costs the tokens behind it in this pass and nothing else; a right one saves a pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sipit.inversion.proposals.proposal import Draft, Guesses

_SETTLED = (12.0, 64.0)  # positions that a pass settles, at least and at most: one is worth that part of a pass
_FAR = 64  # positions ahead that are looked at for what their distances tell
_TOLD = 1.6  # passes that it is worth to have run a right token behind a path that may be wrong
_UNLIKELY = 0.05  # chance of a run of guesses from which on its length is not followed
_GROWN = 0.6  # of a pass, the most that guesses may fill: what must be checked beside them is to find room too
_LIKELY = 0.25  # chance of a guess from which what has to be checked beside it is worth asking for
Beside = Callable[[list[tuple[int, int]]], list[list[int]]]  # (token, position) → tokens to be checked beside it there
_ROOT = -1  # what the candidates for the next position continue: the accepted prefix


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The tokens of one packed pass. Q tokens."""

    token_ids: Tensor  # (Q,)
    positions: Tensor  # (Q,)
    attends: Tensor | None  # (Q, Q) bool; None: each token is alone behind the prefix
    parents: tuple[int, ...]  # column that each token continues; -1 for the accepted prefix

    def behind(self, column: int = _ROOT) -> list[int]:
        """Return the columns that continue a column, or the prefix."""
        return self._behind.get(column, [])

    @cached_property
    def _behind(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for child, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(child)
        return found


class _Ahead:
    """Guesses for the positions behind the next one, drawn as far as they are asked for."""

    def __init__(self, ahead: Iterator[Guesses]) -> None:
        self._ahead = ahead
        self._drawn: list[Guesses] = []

    def at(self, depth: int, rank: int) -> tuple[int, float] | None:
        """Return the token of a rank at a depth, from 1, and its chance; None where there is none."""
        while len(self._drawn) < depth:
            drawn = next(self._ahead, None)
            if drawn is None:
                return None
            self._drawn.append(drawn)
        token_ids, chances = self._drawn[depth - 1]
        return (token_ids[rank], chances[rank]) if rank < len(token_ids) else None


def build_tree(
    batch: Tensor, position: int, draft: Draft | None, *, max_tokens: int, price: float, beside: Beside | None = None
) -> Tree:
    """Return the tree of one pass: `batch` at `position`, then guesses while they are likely enough for its price.

    A token costs one, wherever it stands, and is of use where all that it continues proves right and it does too.
    Another guess beside one saves a pass then; the best guess saves the share of a pass that one position is of all
    that it may settle. What has to be checked beside a guess before it is accepted saves a pass if the guess is right.
    """
    growth = _Growth(max_tokens, price)
    for token_id in batch.tolist():
        growth.add(token_id, _ROOT, 0, 0.0)
    if draft is not None:
        growth.chances[: len(draft.here)] = draft.here[: len(batch)]
        ahead = _Ahead(draft.ahead)
        growth.grow(ahead)
        growth.scout(ahead)
        if beside is not None:
            growth.widen(beside, position)
    return Tree(
        token_ids=torch.tensor(growth.token_ids),
        positions=torch.tensor(growth.depths) + position,
        attends=_attends(growth.parents) if max(growth.depths) else None,
        parents=tuple(growth.parents),
    )


class _Growth:
    """A tree as it grows, column by column."""

    def __init__(self, max_tokens: int, price: float) -> None:
        self.token_ids: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.chances: list[float] = []  # that it and all that it continues are right
        self._max_tokens = max_tokens
        self._max_grown = int(_GROWN * max_tokens)
        self._price = price
        self._columns: dict[tuple[int, int], int] = {}  # (column continued, token) → its column

    def add(self, token_id: int, parent: int, depth: int, chance: float) -> int:
        """Return the column of a token behind another one, a new one where there is none yet."""
        column = self._columns.setdefault((parent, token_id), len(self.token_ids))
        if column == len(self.token_ids):
            self.token_ids.append(token_id)
            self.parents.append(parent)
            self.depths.append(depth)
            self.chances.append(chance)
        return column

    def grow(self, ahead: _Ahead) -> None:
        """Add guesses that are worth their place, the worthiest first."""
        # Each with what it is worth: (-worth, depth, column continued, rank, token, chance).
        heap: list[tuple[float, int, int, int, int, float]] = []

        n_settled = min(max(_expected_run(ahead), _SETTLED[0]), _SETTLED[1])

        def offer(depth: int, parent: int, rank: int) -> None:
            found, reached = ahead.at(depth, rank), self.chances[parent]
            if found is not None:
                chance = reached * found[1]
                # The best guess is to be run sooner or later in any case, if what it continues is right.
                worth = self._price * chance if rank else reached * (self._price / n_settled + 1)
                if worth >= 1:
                    heapq.heappush(heap, (-worth, depth, parent, rank, found[0], chance))

        for column in range(len(self.token_ids)):
            offer(1, column, 0)
        while heap and len(self.token_ids) < self._max_grown:
            _, depth, parent, rank, token_id, chance = heapq.heappop(heap)
            column = self.add(token_id, parent, depth, chance)
            offer(depth, parent, rank + 1)
            offer(depth + 1, column, 0)

    def scout(self, ahead: _Ahead) -> None:
        """Go on behind the best guesses as far as what the tokens there tell is worth their place.

        Behind a wrong token no check counts, but a right one is nearer than the others beside it; so what was run
        along there puts the guesses of a later pass right, many positions at once.
        """
        root = max((i for i, parent in enumerate(self.parents) if parent == _ROOT), key=self.chances.__getitem__)
        column: int | None = root
        gain, best_gain, n_worth = 0.0, 0.0, 0
        planned: list[list[tuple[int, float]]] = []  # by depth: tokens and their chances, the best one first
        while len(planned) < _FAR and (first := ahead.at(len(planned) + 1, 0)) is not None:
            tokens = [first]
            column = None if column is None else self._columns.get((column, first[0]))
            gain -= column is None
            while (other := ahead.at(len(planned) + 1, len(tokens))) is not None and other[1] * _TOLD * self._price > 1:
                tokens.append(other)
                gain += other[1] * _TOLD * self._price - 1
            planned.append(tokens)
            if gain > best_gain:
                best_gain, n_worth = gain, len(planned)
        parent, reached = root, self.chances[root]
        for depth, tokens in enumerate(planned[:n_worth], 1):
            if len(self.token_ids) + len(tokens) > self._max_grown:
                return
            columns = [self.add(token_id, parent, depth, reached * chance) for token_id, chance in tokens]
            parent, reached = columns[0], self.chances[columns[0]]

    def widen(self, beside: Beside, position: int) -> None:
        """Add what has to be checked before a likely guess is accepted, where that is worth the place it takes."""
        likely = [column for column, chance in enumerate(self.chances) if chance >= _LIKELY]
        asked = [(self.token_ids[column], position + self.depths[column]) for column in likely]
        for column, others in zip(likely, beside(asked), strict=True):
            if len(others) <= min(self.chances[column] * self._price, self._max_tokens - len(self.token_ids)):
                for other in others:
                    self.add(other, self.parents[column], self.depths[column], 0.0)


def _expected_run(ahead: _Ahead) -> float:
    """Return how many of the best guesses are expected to be right, one after the other, behind a right token."""
    expected, chance, depth = 0.0, 1.0, 1
    while chance > _UNLIKELY and expected < _SETTLED[1] and (found := ahead.at(depth, 0)) is not None:
        chance *= found[1]
        expected, depth = expected + chance, depth + 1
    return expected


def _attends(parents: list[int]) -> Tensor:
    attends = torch.eye(len(parents), dtype=torch.bool)  # (Q, Q)
    for column, parent in enumerate(parents):
        if parent != _ROOT:
            attends[column] |= attends[parent]
    return attends
