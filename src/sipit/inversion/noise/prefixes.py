"""The prefixes of several beams in one cache: tokens they share are held, and were computed, once."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from sipit.inversion.noise.fast_passes import Passes
from sipit.models import TruncatedModel


class BeamPrefixes:
    """Prefixes of one length, B of them, that grow by a token at a time and fork.

    Args:
        model: cut where states are wanted.
        known: token ids before the first position, the same for all: (P,).
        max_batch: most tokens in one packed pass.
        passes: what passes are run within.
    """

    def __init__(self, model: TruncatedModel, known: Tensor, *, max_batch: int, passes: Passes = nullcontext) -> None:
        self._passes = passes
        self._row = model.row(known)
        self.layer = model.layer
        self._continues = torch.ones(1, len(known), dtype=torch.bool)  # (B, kept tokens) those of each prefix
        self._max_batch = max_batch
        self.position = len(known)

    def states(self, token_ids: Tensor, beams: Tensor) -> Tensor:
        """Return the values of tokens behind prefixes, each alone. (Q,), (Q,) → (Q, W)."""
        parts = []
        for part in torch.arange(len(token_ids)).split(self._max_batch):
            places = torch.full((len(part),), self.position)
            continues = self._continues[beams[part]]
            with self._passes():
                parts.append(self._row.run(token_ids[part], places, continues=continues))
        return torch.cat(parts)

    def grow(self, token_ids: Tensor, beams: Tensor) -> Tensor:
        """Make new beams of tokens behind old ones, and return their values. (B',), (B',) → (B', W)."""
        n_new = len(token_ids)
        places = torch.full((n_new,), self.position)
        with self._passes():
            states = self._row.run(token_ids, places, continues=self._continues[beams])
        self._row.keep(range(n_new))
        continues = torch.cat([self._continues[beams], torch.eye(n_new, dtype=torch.bool)], dim=1)
        alive = continues.any(dim=0).nonzero()[:, 0]
        self._row.select(alive)
        self._continues = continues[:, alive]
        self.position += 1
        return states
