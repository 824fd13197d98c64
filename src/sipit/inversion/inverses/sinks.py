"""Which states are read as first ones: attention uses the first token, and a few later ones, as a sink."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

_DOUBTFUL_COSINE = 0.1  # below the sink cosine by less, a state that is hard to read may be of the first kind
_WHOLE = 0.5  # of the mean first state's length: one that is shorter may be a half sink


def sink_cosine(firsts: Tensor, rests: Tensor) -> float:
    """Return the cosine to the mean first state above which a later state is one of its kind. (N, D), (M, D).

    The first token's state serves attention as a sink, and so do a few later ones: a delimiter at
    position 1, the repeats of one token. They are long, alike, and read by the first position's
    inverse, not by the others'. Where the two kinds cannot be told apart, no cosine is high enough.
    """
    mean = firsts.mean(dim=0).float()
    low = float(cosine_to(rests, mean).quantile(0.95))
    high = float(cosine_to(firsts, mean).quantile(0.05))
    return low + 0.8 * (high - low) if high > low + 0.1 else 2.0


def are_sink_like(states: Tensor, positions: Tensor, mean: Tensor, least_cosine: float) -> Tensor:
    """Return which positions of a prompt have states that are read as first ones. (T, D), (N,), (D,) → (N,) bool."""
    positions = positions.to(states.device)
    return (positions == 0) | (cosine_to(states[positions], mean) > least_cosine)


def alternative_kind(
    states: Tensor, position: int, mean: Tensor, least_cosine: float
) -> Literal["first", "later"] | None:
    """Return as which kind the state at a position may be read too; None where its kind is clear. (T, D), (D,)."""
    if position == 0:
        return None
    state = states[position].float()
    cosine = float(cosine_to(state[None], mean))
    if cosine > least_cosine:
        return "later" if float(state.norm()) < _WHOLE * float(mean.norm()) else None
    return "first" if cosine > least_cosine - _DOUBTFUL_COSINE else None


def cosine_to(states: Tensor, mean: Tensor) -> Tensor:
    """Return the cosine of each state with one vector. (N, D), (D,) → (N,)."""
    return nn.functional.cosine_similarity(states.float(), mean.to(states.device, torch.float32)[None], dim=1)
