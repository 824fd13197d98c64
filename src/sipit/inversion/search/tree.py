"""One packed pass as a tree: candidates for the next position, guesses behind them, and behind those.

A wrong guess costs the tokens behind it in this pass and nothing else; a right one saves a pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.proposals.proposal import Draft

_POSITIONS_A_PASS = 4.0  # that a pass settles, about: what one more level in it is worth is this part of a pass
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
        return [child for child, parent in enumerate(self.parents) if parent == column]


class _Ahead:
    """Guesses for the positions behind the next one, drawn as far as they are asked for."""

    def __init__(self, ahead: Iterator[tuple[Tensor, Tensor]]) -> None:
        self._ahead = ahead
        self._drawn: list[tuple[list[int], list[float]]] = []

    def at(self, depth: int, rank: int) -> tuple[int, float] | None:
        """Return the token of a rank at a depth, from 1, and its chance; None where there is none."""
        while len(self._drawn) < depth:
            drawn = next(self._ahead, None)
            if drawn is None:
                return None
            self._drawn.append((drawn[0].tolist(), drawn[1].tolist()))
        token_ids, chances = self._drawn[depth - 1]
        return (token_ids[rank], chances[rank]) if rank < len(token_ids) else None


def build_tree(batch: Tensor, position: int, draft: Draft | None, max_tokens: int, price: float) -> Tree:
    """Return the tree of one pass: `batch` at `position`, then guesses while they are likely enough for its price.

    A token costs one, wherever it stands, and is of use where all that it continues proves right and it does too.
    Another guess beside one saves a pass then; the best guess saves the share of a pass that one position of many is.
    """
    token_ids, parents, depths = batch.tolist(), [_ROOT] * len(batch), [0] * len(batch)
    if draft is not None:
        ahead, here = _Ahead(draft.ahead), draft.here[: len(batch)].tolist()
        # Guesses by what they are worth: (-worth, depth, column continued, rank, its chance, token, chance).
        heap: list[tuple[float, int, int, int, float, int, float]] = []

        def offer(depth: int, parent: int, reached: float, rank: int) -> None:
            found = ahead.at(depth, rank)
            if found is not None:
                chance = reached * found[1]
                worth = price * (chance if rank else reached / _POSITIONS_A_PASS)
                if worth >= 1:
                    heapq.heappush(heap, (-worth, depth, parent, rank, reached, found[0], chance))

        for column, chance in enumerate(here):
            offer(1, column, chance, 0)
        while heap and len(token_ids) < max_tokens:
            _, depth, parent, rank, reached, token_id, chance = heapq.heappop(heap)
            offer(depth, parent, reached, rank + 1)
            offer(depth + 1, len(token_ids), chance, 0)
            token_ids.append(token_id)
            parents.append(parent)
            depths.append(depth)
    return Tree(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(depths) + position,
        attends=_attends(parents) if depths[-1] else None,
        parents=tuple(parents),
    )


def _attends(parents: list[int]) -> Tensor:
    attends = torch.eye(len(parents), dtype=torch.bool)  # (Q, Q)
    for column, parent in enumerate(parents):
        if parent != _ROOT:
            attends[column] |= attends[parent]
    return attends
