"""Ridge regression from states to token keys, and the random tokens it is made on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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


_DOUBTFUL_COSINE = 0.1  # below the sink cosine by less, a state that is hard to read may be of the first kind
_WHOLE = 0.5  # of the mean first state's length: one that is shorter may be a half sink


def sink_cosine(firsts: Tensor, rests: Tensor) -> float:
    """Return the cosine to the mean first state above which a later state is one of its kind. (N, D), (M, D).

    The first token's state serves attention as a sink, and so do a few later ones: a delimiter at
    position 1, the repeats of one token. They are long, alike, and read by the first position's
    inverse, not by the others'. Where the two kinds cannot be told apart, no cosine is high enough.
    """
    mean = firsts.mean(dim=0).float()
    low = cosine_to(rests, mean).quantile(0.95)
    high = cosine_to(firsts, mean).quantile(0.05)
    return float(low + 0.8 * (high - low)) if high > low + 0.1 else 2.0


def is_first_kind(states: Tensor, mean: Tensor, least_cosine: float) -> Tensor:
    """Return which states of one prompt are read as first ones. (T, D), (D,) → (T,) bool."""
    is_first = cosine_to(states, mean) > least_cosine
    is_first[0] = True
    return is_first


def is_first_kind_at(states: Tensor, position: int, mean: Tensor, least_cosine: float) -> bool:
    """Return whether the state at one position of a prompt is read as a first one. (T, D), (D,)."""
    return position == 0 or float(cosine_to(states[position][None], mean)) > least_cosine


def other_kind(states: Tensor, position: int, mean: Tensor, least_cosine: float) -> Literal["first", "later"] | None:
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
    return nn.functional.cosine_similarity(states.float(), mean.float()[None], dim=1)


def spread_ids(vocab_size: int, n: int, generator: torch.Generator) -> Tensor:
    """Return random tokens, half of them uniform, half log-uniform in the token id. (N,).

    Tokenizers built by merging number their tokens by falling frequency, and the embeddings of
    frequent tokens lie apart from the others.
    """
    uniform = torch.rand(n, generator=generator)
    ids = (uniform * vocab_size).long()
    frequent = torch.exp(torch.rand(n, generator=generator) * math.log(vocab_size)).long()
    return torch.where(torch.rand(n, generator=generator) < 0.5, ids, frequent).clamp_(max=vocab_size - 1)


def frequent_and_other_ids(vocab_size: int, n: int, generator: torch.Generator) -> Tensor:
    """Return different tokens: the n/2 of the lowest ids, which are frequent ones, and others at random. (N,).

    A regression serves the tokens it was made on best, so frequent ones are all among them, once each:
    drawn again and again they would outweigh the rest.
    """
    n_low = min(n // 2, vocab_size)
    others = n_low + torch.randperm(vocab_size - n_low, generator=generator)
    return torch.cat([torch.arange(n_low), others[: n - n_low]])
