"""The prefixes of several beams in one cache: tokens they share are held, and were computed, once."""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.models import TruncatedModel


class BeamPrefixes:
    """Prefixes of one length, B of them, that grow by a token at a time and fork.

    Args:
        model: cut where states are wanted.
        known: token ids before the first position, the same for all: (P,).
        max_batch: most tokens in one packed pass.
    """

    def __init__(self, model: TruncatedModel, known: Tensor, *, max_batch: int) -> None:
        self._model = model
        self._cache = model.cache_of(known)
        self._attends = torch.ones(1, len(known), dtype=torch.bool)  # (B, kept tokens) those of each prefix
        self._max_batch = max_batch
        self.position = len(known)

    def states(self, token_ids: Tensor, beams: Tensor) -> Tensor:
        """Return the values of tokens behind prefixes, each alone. (Q,), (Q,) → (Q, W)."""
        parts = []
        for part in torch.arange(len(token_ids)).split(self._max_batch):
            places = torch.full((len(part),), self.position)
            attends = self._attends[beams[part]]
            parts.append(self._model.packed(self._cache, token_ids[part], places, attends=attends))
        return torch.cat(parts)

    def grow(self, token_ids: Tensor, beams: Tensor) -> Tensor:
        """Make new beams of tokens behind old ones, and return their values. (B',), (B',) → (B', W)."""
        n_new = len(token_ids)
        places = torch.full((n_new,), self.position)
        states = self._model.packed(self._cache, token_ids, places, attends=self._attends[beams])
        self._cache.keep(range(n_new))
        attends = torch.cat([self._attends[beams], torch.eye(n_new, dtype=torch.bool)], dim=1)
        alive = attends.any(dim=0).nonzero()[:, 0]
        self._cache.select(alive)
        self._attends = attends[:, alive]
        self.position += 1
        return states
