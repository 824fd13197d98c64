"""Ridge regression from states to token keys, and the random tokens it is made on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_RIDGE = 0.1  # of the mean squared norm of a standardised state
_AMENDING_RIDGE = 3.0  # the same, on the few candidates of one position: strong, since they are few and alike
_AMENDED = 0.6  # of what the regression says is missing: candidates checked in vain share errors with each other
_TINY = 1e-30  # keeps states that are all the same from dividing by zero


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """A linear map from states to keys, on standardised states."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    weight: Tensor  # (D, K)
    bias: Tensor  # (K,)

    def __call__(self, states: Tensor) -> Tensor:
        """Return unit queries. (N, D) → (N, K)."""
        return nn.functional.normalize(self.predicted(states), dim=1)

    def predicted(self, states: Tensor) -> Tensor:
        """Return what the map gives, of any length. (N, D) → (N, K)."""
        return ((states - self.mean) / self.scale) @ self.weight + self.bias


def ridge(states: Tensor, keys: Tensor, strength: float = _RIDGE) -> Ridge:
    """Return the ridge regression from states to keys. (N, D), (N, K)."""
    mean, scale = states.mean(dim=0), states.std(dim=0)
    scale = scale + 1e-6 * scale.max() + 1e-12 * mean.abs().max() + _TINY
    x = (states - mean) / scale  # (N, D)
    bias = keys.mean(dim=0)
    y = keys - bias
    n_rows, width = x.shape
    if n_rows < width:  # the dual form solves the smaller system
        gram = x @ x.T
        gram.diagonal().add_(strength * gram.diagonal().mean() + _TINY)
        weight = x.T @ torch.linalg.solve(gram, y)
    else:
        gram = x.T @ x
        gram.diagonal().add_(strength * x.square().sum() / n_rows + _TINY)
        weight = torch.linalg.solve(gram, x.T @ y)
    return Ridge(mean=mean, scale=scale, weight=weight, bias=bias)


def amended_query(states: Tensor, queries: Tensor, wanted: Tensor) -> Tensor:
    """Return the first state's query, corrected by what those of the other states miss. (N + 1, D), (N + 1, K), (N, K).

    The others are states of candidates at the first one's position, whose tokens are known: a ridge
    regression tells from a state what an inverse gets wrong here.
    """
    missing = ridge(states[1:], wanted - queries[1:], _AMENDING_RIDGE).predicted(states[:1])[0]  # (K,)
    return queries[0] + _AMENDED * missing
