"""A closed-form inverse from states to tokens, from a couple of thousand random tokens run once.

No training: the states of random tokens (anchors) and their embeddings give a ridge regression from
state to token key. It is weak beside a fitted inverse and costs a second instead of minutes. The
first position, whose states have extreme norms and no context, has a regression of its own.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.regression import (
    Ridge,
    amended_query,
    is_first_kind,
    is_first_kind_at,
    other_kind,
    ridge,
    sink_cosine,
    spread_ids,
)
from sipit.inversion.result import Meter
from sipit.inversion.token_keys import TokenKeys, token_keys
from sipit.models import LanguageModel
from sipit.observations import Site

_PROMPTS = ((16, 112), (64, 4))  # number and length of the anchor prompts; the short ones for early positions
_BATCH = 512  # tokens run at once
_FIRSTS = 256  # anchors of the first position


@dataclass(frozen=True, kw_only=True)
class AnchorInverse:
    """Scores for every token from one observed state."""

    keys: TokenKeys
    first: Ridge
    rest: Ridge
    sink_cosine: float  # states nearer than this to the mean first state are read as first ones
    block_tokens: int  # what the anchors cost
    doubtful_weights: tuple[float, float] = (50.0, 1.0)
    echo_reach: float = 0.2
    weights: tuple[tuple[float, float], ...] = (
        *((50.0, 1.0), (25.0, 1.0), (100.0, 1.0), (200.0, 1.0)),
        *((25.0, 0.0), (50.0, 0.0), (100.0, 0.0), (200.0, 0.0)),
    )

    def queries(self, states: Tensor) -> Tensor:
        """Return one unit query a position of one prompt. (T, D) → (T, K)."""
        states = states.float()
        is_sink = is_first_kind(states, self.first.mean, self.sink_cosine)  # (T,)
        return torch.where(is_sink[:, None], self.first(states), self.rest(states))

    def amended_query(self, observed: Tensor, position: int, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return the query at a position, corrected by candidates checked there. (T, D), (N, D), (N,) → (K,)."""
        is_sink = is_first_kind_at(observed, position, self.first.mean, self.sink_cosine)
        rows = torch.cat([observed[position][None], states]).float()  # (N + 1, D)
        return amended_query(rows, (self.first if is_sink else self.rest)(rows), self.keys.keys(token_ids))

    def other_query(self, observed: Tensor, position: int) -> Tensor | None:
        """Return the query by the other regression where a state may be of the other kind. (T, D) → (K,)."""
        kind = other_kind(observed, position, self.first.mean, self.sink_cosine)
        if kind is None:
            return None
        return (self.first if kind == "first" else self.rest)(observed[position][None].float())[0]

    def scores(self, queries: Tensor) -> Tensor:
        """Return the cosine of each query with every token's key. (N, K) → (N, V)."""
        return self.keys.scores(queries)


_made: weakref.WeakKeyDictionary[LanguageModel, dict[tuple[int, Site], AnchorInverse]] = weakref.WeakKeyDictionary()


def anchor_inverse(lm: LanguageModel, layer: int, site: Site, meter: Meter) -> AnchorInverse:
    """Return the anchors' inverse of a cut, made once; the search that needs it first pays for it."""
    known = _made.setdefault(lm, {})
    if (layer, site) not in known:
        known[(layer, site)] = _fit(lm, layer, site)
        meter.block_tokens += known[(layer, site)].block_tokens
    return known[(layer, site)]


def _fit(lm: LanguageModel, layer: int, site: Site) -> AnchorInverse:
    generator = torch.Generator().manual_seed(1)
    keys = token_keys(lm)
    tapped = lm.tapped([(layer, site)])
    states, tokens, spent = [], [], 0
    for n_prompts, wanted in _PROMPTS:
        length = min(wanted, lm.max_positions or wanted)
        ids = spread_ids(lm.vocab_size, n_prompts * length, generator).view(n_prompts, length)
        for batch in ids.split(max(1, _BATCH // length)):
            states.append(tapped.states(batch)[0][:, 1:].flatten(0, 1).float())
            tokens.append(batch[:, 1:].flatten())
        spent += n_prompts * length
    firsts = spread_ids(lm.vocab_size, _FIRSTS, generator)
    cut = lm.cut(layer, site)
    alone = cut.packed(cut.new_cache(), firsts, torch.zeros_like(firsts)).float()  # (N, D)
    return AnchorInverse(
        keys=keys,
        first=ridge(alone, keys.keys(firsts), strength=1e-3),
        rest=ridge(torch.cat(states), keys.keys(torch.cat(tokens))),
        sink_cosine=sink_cosine(alone, torch.cat(states)),
        block_tokens=(spent + len(firsts)) * layer,
    )
