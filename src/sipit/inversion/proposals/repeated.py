"""Later states that lie near an earlier one: nearly always the same token again.

Repeated tokens, runs of newlines and padding have states an inverse reads badly, because they are like
nothing it was made on; but they are like one another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = 512  # states compared with all before them at a time


class RepeatedStates:
    """For each position of a prompt the first one before it whose observed state lies near.

    Args:
        observed: the states of the prompt, (T, D).
        reach: how near, as a share of the later state's norm. At four depths of SmolLM2 the nearest state
            before one was that of the same token in all but 1 of 942 cases within 0.1, and in all but 3 of 100
            within 0.2.
    """

    def __init__(self, observed: Tensor, reach: float) -> None:
        self._sources = first_near(observed, reach)

    def token(self, position: int, prefix: Sequence[int]) -> int | None:
        """Return the token whose state a position's is near, once it is recovered."""
        source = self._sources.get(position)
        return prefix[source] if source is not None and source < len(prefix) else None


def first_near(states: Tensor, reach: float) -> dict[int, int]:
    """Return position → the first position before it within reach, where there is one. (T, D)."""
    states = states.float()
    scale = states.abs().amax().clamp(min=1e-30)
    states = states / scale  # so that no square overflows
    squares = states.square().sum(dim=1)  # (T,)
    found: dict[int, int] = {}
    for start in range(0, len(states), _ROWS):
        stop = min(start + _ROWS, len(states))
        rows = states[start:stop]
        gaps = squares[start:stop, None] + squares[None, :stop] - 2 * (rows @ states[:stop].T)  # (R, stop)
        near = gaps < reach**2 * squares[start:stop, None]
        near &= torch.ones_like(near).tril(start - 1)  # earlier ones only
        positions = near.any(dim=1).nonzero()[:, 0]
        sources = near[positions].float().argmax(dim=1)  # the first of the largest
        found.update(zip((positions + start).tolist(), sources.tolist(), strict=True))
    return found
