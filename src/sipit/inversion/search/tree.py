"""One packed pass as a tree: candidates for the next position, guesses behind the best of them.

A wrong guess costs the tokens behind it in this pass and nothing else; a right one saves a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.proposals.proposal import Draft

_POSITIONS_A_PASS = 4.0  # that a pass settles, about: what one more level in it is worth is this part of a pass


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The tokens of one packed pass. Q tokens; each level is a position."""

    token_ids: Tensor  # (Q,)
    positions: Tensor  # (Q,)
    attends: Tensor | None  # (Q, Q) bool; None: each token is alone behind the prefix
    levels: tuple[tuple[int, ...], ...]  # the columns of each position
    chain: tuple[int, ...]  # the column of each level that the next level continues


def build_tree(batch: Tensor, position: int, draft: Draft | None, max_tokens: int, price: float) -> Tree:
    """Return the tree of one pass: `batch` at `position`, then guesses while they are likely enough for its price.

    A token costs one, wherever it stands. Another guess at a level saves a pass if all before it prove right and it
    is the right one; one more level saves the share of a pass that one position of many is.
    """
    tokens, places = [batch], [torch.full_like(batch, position)]
    levels, chain = [tuple(range(len(batch)))], [0]
    n_tokens, reached = len(batch), 0.0 if draft is None else draft.first  # probability that the chain is right so far
    if draft is not None:
        for step, (token_ids, chances) in enumerate(draft.ahead, start=1):
            if reached * price < _POSITIONS_A_PASS or n_tokens >= max_tokens:
                break
            n_worth = int((reached * chances[1:] * price >= 1).int().cumprod(dim=0).sum()) + 1
            width = min(n_worth, max_tokens - n_tokens)
            tokens.append(token_ids[:width])
            places.append(torch.full((width,), position + step))
            levels.append(tuple(range(n_tokens, n_tokens + width)))
            chain.append(n_tokens)
            n_tokens += width
            reached *= float(chances[0])
    return Tree(
        token_ids=torch.cat(tokens),
        positions=torch.cat(places),
        attends=_attends(levels, chain) if len(levels) > 1 else None,
        levels=tuple(levels),
        chain=tuple(chain),
    )


def _attends(levels: list[tuple[int, ...]], chain: list[int]) -> Tensor:
    n_tokens = levels[-1][-1] + 1
    attends = torch.eye(n_tokens, dtype=torch.bool)  # (Q, Q)
    for depth, level in enumerate(levels):
        attends[level[0] : level[-1] + 1, chain[:depth]] = True
    return attends
