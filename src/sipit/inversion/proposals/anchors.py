"""A closed-form inverse from states to tokens, from a couple of thousand random tokens run once.

No training: the states of random tokens (anchors) and their embeddings give a ridge regression from
state to token key. It is weak beside a fitted inverse and costs a second instead of minutes. The
first position, whose states have extreme norms and no context, has a regression of its own.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sipit.inversion.proposals.token_keys import TokenKeys, token_keys
from sipit.inversion.result import Meter
from sipit.models import LanguageModel, TruncatedModel
from sipit.observations import Site

_LENGTH = 128  # tokens of one anchor prompt
_PROMPTS = 16
_FIRSTS = 256  # anchors of the first position
_RIDGE = 0.1  # of the mean squared norm of a standardised state


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """A linear map from states to keys, on standardised states."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    weight: Tensor  # (D, K)
    bias: Tensor  # (K,)

    def __call__(self, states: Tensor) -> Tensor:
        """Return unit queries. (N, D) → (N, K)."""
        queries = ((states - self.mean) / self.scale) @ self.weight + self.bias
        return nn.functional.normalize(queries, dim=1)


def ridge(states: Tensor, keys: Tensor, strength: float = _RIDGE) -> Ridge:
    """Return the ridge regression from states to keys. (N, D), (N, K)."""
    mean, scale = states.mean(dim=0), states.std(dim=0)
    scale = scale + 1e-6 * scale.max() + 1e-30
    x = (states - mean) / scale  # (N, D)
    bias = keys.mean(dim=0)
    y = keys - bias
    n_rows, width = x.shape
    if n_rows < width:  # the dual form solves the smaller system
        gram = x @ x.T
        gram.diagonal().add_(strength * gram.diagonal().mean())
        weight = x.T @ torch.linalg.solve(gram, y)
    else:
        gram = x.T @ x
        gram.diagonal().add_(strength * x.square().sum() / n_rows)
        weight = torch.linalg.solve(gram, x.T @ y)
    return Ridge(mean=mean, scale=scale, weight=weight, bias=bias)


@dataclass(frozen=True, kw_only=True)
class AnchorInverse:
    """Scores for every token from one observed state."""

    keys: TokenKeys
    first: Ridge
    rest: Ridge
    block_tokens: int  # what the anchors cost
    weights: tuple[tuple[float, float], ...] = (
        *((50.0, 1.0), (25.0, 1.0), (100.0, 1.0), (200.0, 1.0)),
        *((25.0, 0.0), (50.0, 0.0), (100.0, 0.0), (200.0, 0.0)),
    )

    def queries(self, states: Tensor) -> Tensor:
        """Return one unit query a position of one prompt. (T, D) → (T, K)."""
        states = states.float()
        return torch.cat([self.first(states[:1]), self.rest(states[1:])])

    def scores(self, queries: Tensor) -> Tensor:
        """Return the cosine of each query with every token's key. (N, K) → (N, V)."""
        return self.keys.scores(queries)


_made: weakref.WeakKeyDictionary[LanguageModel, dict[tuple[int, Site], AnchorInverse]] = weakref.WeakKeyDictionary()


def anchor_inverse(lm: LanguageModel, layer: int, site: Site, meter: Meter) -> AnchorInverse:
    """Return the anchors' inverse of a cut, made once; the search that needs it first pays for it."""
    known = _made.setdefault(lm, {})
    if (layer, site) not in known:
        known[(layer, site)] = _fit(lm, lm.cut(layer, site))
        meter.block_tokens += known[(layer, site)].block_tokens
    return known[(layer, site)]


def _fit(lm: LanguageModel, cut: TruncatedModel) -> AnchorInverse:
    generator = torch.Generator().manual_seed(1)
    keys = token_keys(lm)
    states, tokens = [], []
    length = min(_LENGTH, lm.max_positions or _LENGTH)
    for _ in range(_PROMPTS):
        ids = anchor_ids(lm.vocab_size, length, generator)
        states.append(cut.ordinary(ids)[1:].float())
        tokens.append(ids[1:])
    firsts = anchor_ids(lm.vocab_size, _FIRSTS, generator)
    alone = cut.packed(cut.new_cache(), firsts, torch.zeros_like(firsts)).float()  # (N, D)
    return AnchorInverse(
        keys=keys,
        first=ridge(alone, keys.keys(firsts), strength=1e-3),
        rest=ridge(torch.cat(states), keys.keys(torch.cat(tokens))),
        block_tokens=(_PROMPTS * length + len(firsts)) * cut.layer,
    )


def anchor_ids(vocab_size: int, n: int, generator: torch.Generator) -> Tensor:
    """Return random tokens, half of them uniform, half log-uniform in the token id. (N,).

    Tokenizers built by merging number their tokens by falling frequency, and the embeddings of
    frequent tokens lie apart from the others.
    """
    uniform = torch.rand(n, generator=generator)
    ids = (uniform * vocab_size).long()
    frequent = torch.exp(torch.rand(n, generator=generator) * math.log(vocab_size)).long()
    return torch.where(torch.rand(n, generator=generator) < 0.5, ids, frequent).clamp_(max=vocab_size - 1)
