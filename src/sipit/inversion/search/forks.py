"""A position where several tokens fit, settled by the state behind it.

Rounding may leave so little of one state that hundreds of tokens fit it: the first one's massive coordinate sets the
scale of a whole row of integers. The next state depends on the token all the same. So each of those tokens is
run with what may follow it, and those behind which nothing fits are out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class Followed:
    """A token of a fork, and the nearest of the tokens that were run behind it."""

    token_id: int  # at the fork
    next_id: int  # behind it
    distance: float  # L2 of the latter to the state there
    is_near: bool  # whether it fits


def followed(check: PackedCheck, fork: Fork, next_ids: Sequence[int], max_batch: int) -> list[Followed]:
    """Return each token of a fork with what comes nearest behind it: those behind which a token fits, then the rest.

    The row of the check must hold the prefix before the fork, and nothing behind it.

    Args:
        check: judges them.
        fork: the tokens in question. (A,)
        next_ids: candidates for the position behind the fork. (K,)
        max_batch: most tokens in one packed pass.
    """
    best: dict[int, Followed] = {}
    n_at_once = max(1, max_batch - 1)
    for start in range(0, len(next_ids), n_at_once):
        for one in _pairs(check, fork, next_ids[start : start + n_at_once], max_batch):
            if one.token_id not in best or _order(one) < _order(best[one.token_id]):
                best[one.token_id] = one
    return sorted(best.values(), key=_order)


def _order(one: Followed) -> tuple[bool, float]:
    return not one.is_near, one.distance


def _pairs(check: PackedCheck, fork: Fork, next_ids: Sequence[int], max_batch: int) -> Iterator[Followed]:
    branch = 1 + len(next_ids)  # columns: a token, then each candidate behind it alone
    attends = torch.eye(branch, dtype=torch.bool)
    attends[:, 0] = True
    for part in fork.token_ids.split(max(1, max_batch // branch)):
        tokens = torch.cat([torch.tensor([int(token_id), *next_ids]) for token_id in part])  # (B * (1 + K),)
        positions = torch.tensor([fork.position] + [fork.position + 1] * len(next_ids)).repeat(len(part))
        judged = check.run(tokens, positions, torch.block_diag(*[attends] * len(part)).bool())
        near, distances = (values.cpu().view(len(part), branch)[:, 1:] for values in (judged.is_near, judged.distances))
        for row, token_id in enumerate(part.tolist()):
            fitting = distances[row].masked_fill(~near[row], torch.inf) if bool(near[row].any()) else distances[row]
            place = int(fitting.argmin())
            yield Followed(
                token_id=token_id,
                next_id=next_ids[place],
                distance=float(distances[row, place]),
                is_near=bool(near[row, place]),
            )
