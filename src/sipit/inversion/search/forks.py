"""A position where several tokens fit, settled by the state behind it.

Rounding may leave so little of one state that hundreds of tokens fit it: the first one's massive coordinate sets the
scale of a whole row of integers. The next state depends on the token all the same. So each of those tokens is
run with what may follow it, and those behind which nothing fits are out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.judging.check import PackedCheck


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A position where several tokens fit."""

    position: int
    token_ids: Tensor  # (A,) that fit, the nearest first
    distances: Tensor  # (A,) L2 of each to the state there
    is_doubted: bool = False  # whether its tokens were run with a few candidates already, and none survived


@dataclass(frozen=True, kw_only=True)
class Survivor:
    """A token behind which what was observed next fits too."""

    token_id: int  # at the fork
    next_id: int  # at the last position that was looked at
    distance: float  # L2 there


def survivors(check: PackedCheck, fork: Fork, next_ids: Sequence[int], max_batch: int) -> list[Survivor]:
    """Return which tokens of a fork have a state behind them that fits, with the nearest next token of each.

    The cache of the check must hold the prefix before the fork, and nothing behind it.

    Args:
        check: judges them.
        fork: the tokens in question. (A,)
        next_ids: candidates for the position behind the fork. (K,)
        max_batch: most tokens in one packed pass.
    """
    n_at_once = max(1, max_batch - 1)
    if len(next_ids) > n_at_once:
        parts = [next_ids[i : i + n_at_once] for i in range(0, len(next_ids), n_at_once)]
        return _nearest_of_each([one for part in parts for one in survivors(check, fork, part, max_batch)])
    branch = 1 + len(next_ids)  # columns: a token, then each candidate behind it alone
    attends = torch.eye(branch, dtype=torch.bool)
    attends[:, 0] = True
    found: list[Survivor] = []
    for part in fork.token_ids.split(max(1, max_batch // branch)):
        tokens = torch.cat([torch.tensor([int(token_id), *next_ids]) for token_id in part])  # (B * (1 + K),)
        positions = torch.tensor([fork.position] + [fork.position + 1] * len(next_ids)).repeat(len(part))
        sees = torch.block_diag(*[attends] * len(part)).bool()
        states = check.cut.packed(check.cache, tokens, positions, sees, check.lanes(len(tokens)))
        judged = check.judge(tokens, positions, states)
        near, distances = (values.cpu().view(len(part), branch)[:, 1:] for values in (judged.is_near, judged.distances))
        for row in near.any(dim=1).nonzero()[:, 0].tolist():
            best = int(distances[row].masked_fill(~near[row], torch.inf).argmin())
            found.append(
                Survivor(token_id=int(part[row]), next_id=next_ids[best], distance=float(distances[row, best]))
            )
    return _nearest_of_each(found)


def _nearest_of_each(found: Sequence[Survivor]) -> list[Survivor]:
    """Return each token once, with the nearest token behind it; the nearest of all first."""
    nearest: dict[int, Survivor] = {}
    for survivor in sorted(found, key=lambda survivor: survivor.distance):
        nearest.setdefault(survivor.token_id, survivor)
    return list(nearest.values())
