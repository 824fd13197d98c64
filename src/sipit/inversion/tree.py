"""One packed pass as a tree: candidates for the next position, guesses behind the best of them.

A wrong guess costs the tokens behind it in this pass and nothing else; a right one saves a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LONG = 512  # tokens of a prompt at which a pass is worth one
_SHARED_PRICE = 0.25  # least, where prompts share their passes
_LOW_PRICE, _FULL_PRICE = 0.5, 2.0  # 0.4 to 5 were tried: less is more passes, more is up to a prefill of waste


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Guesses that need no recovered prefix."""

    first: float  # probability that the best candidate for the next position is right
    ahead: Iterator[tuple[Tensor, Tensor]]  # for each position after it: token ids (K,), probabilities (K,)


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The tokens of one packed pass. Q tokens; each level is a position."""

    token_ids: Tensor  # (Q,)
    positions: Tensor  # (Q,)
    sees: Tensor | None  # (Q, Q) bool; None: each token is alone behind the prefix
    levels: tuple[tuple[int, ...], ...]  # the columns of each position
    chain: tuple[int, ...]  # the column of each level that the next level continues


def pass_price(seq_len: int, n_sharing: int = 1) -> float:
    """Return what one more pass may cost in wasted tokens.

    Every pass has a cost of its own, whatever it checks, and a window that is too long wastes tokens.
    Short prompts, of which a window easily wastes more than they have, are priced in tokens alone.
    Prompts that share their passes share that cost.
    """
    price = min(max(seq_len / LONG, _LOW_PRICE), _FULL_PRICE)
    return max(price / n_sharing, min(price, _SHARED_PRICE))


def grow(batch: Tensor, position: int, outlook: Outlook | None, max_tokens: int, price: float) -> Tree:
    """Return the tree of one pass: `batch` at `position`, then guesses while they are likely enough for its price."""
    tokens, places = [batch], [torch.full_like(batch, position)]
    levels, chain = [tuple(range(len(batch)))], [0]
    n_tokens, chance = len(batch), 0.0 if outlook is None else outlook.first
    if outlook is not None:
        for step, (token_ids, chances) in enumerate(outlook.ahead, start=1):
            width = min(worthwhile(chances, price), max_tokens - n_tokens)
            if chance * price < 1 - chance or width < 1:
                break
            tokens.append(token_ids[:width])
            places.append(torch.full((width,), position + step))
            levels.append(tuple(range(n_tokens, n_tokens + width)))
            chain.append(n_tokens)
            n_tokens += width
            chance *= float(chances[0])
    return Tree(
        token_ids=torch.cat(tokens),
        positions=torch.cat(places),
        sees=_sees(levels, chain) if len(levels) > 1 else None,
        levels=tuple(levels),
        chain=tuple(chain),
    )


def worthwhile(chances: Tensor, price: float) -> int:
    """Return how many of some tokens, best first, to check in one pass. (N,) → at least 1.

    A token is checked along if it saves a later pass more often, by the price of a pass, than the
    better ones make it useless.
    """
    n_worth, before = 0, 0.0
    for chance in chances.tolist():
        if chance * price < before:
            break
        n_worth += 1
        before += chance
    return max(1, n_worth)


def _sees(levels: list[tuple[int, ...]], chain: list[int]) -> Tensor:
    n_tokens = levels[-1][-1] + 1
    sees = torch.eye(n_tokens, dtype=torch.bool)  # (Q, Q)
    for depth, level in enumerate(levels):
        sees[level[0] : level[-1] + 1, chain[:depth]] = True
    return sees
