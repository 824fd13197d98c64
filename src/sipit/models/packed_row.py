"""One row of packed passes: candidates and guesses behind kept prefixes, from what is run to what is kept of it.

Shapes: Q packed tokens, P kept ones, D = d_model, W = width of the site's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sipit.models.prefix_cache import PrefixCache
from sipit.models.sites import SiteSpec

_NO_LANE = -1  # of tokens that were dropped: no packed token is of it


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where the tokens of one packed pass stand, and what each of them sees."""

    cache: PrefixCache  # of the P kept tokens; its room behind them is overwritten
    positions: Tensor  # (Q,) of the packed tokens, each in its own prompt
    places: Tensor  # (P + Q,) of all tokens, each in its own prompt
    visible: Tensor  # (Q, P + Q) bool: the tokens that each packed one continues, and itself


class RowModel(Protocol):
    """What a row needs of a model cut at a site; `TruncatedModel` is one, and says more of these."""

    layer: int
    spec: SiteSpec

    def run_packed(self, token_ids: Tensor, placed: Placed) -> Tensor: ...

    def run_packed_at(self, token_ids: Tensor, placed: Placed, cuts: Sequence[tuple[int, bool]]) -> list[Tensor]: ...

    def run_packed_embeddings(self, embeddings: Tensor, placed: Placed) -> Tensor: ...


class PackedRow:
    """Prefixes that are kept, and packed passes of tokens that continue them.

    Several prompts may share the row: each has a lane, and a token sees the prefix of its own lane alone.

    Args:
        model: cut where values are wanted.
    """

    def __init__(self, model: RowModel) -> None:
        self._model = model
        self._cache = PrefixCache(model.layer, is_cut=model.spec.ends == "cache")
        self._lanes = torch.empty(0, dtype=torch.long)  # (P,) of each kept token
        self._positions = torch.empty(0, dtype=torch.long)  # (P,) in its own prompt
        self._packed_lanes = self._packed_positions = self._lanes  # (Q,) of the last pass

    @property
    def length(self) -> int:
        """Tokens kept, P, over all lanes."""
        return len(self._lanes)

    def run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attends: Tensor | None = None,
        *,
        lanes: Tensor | None = None,
        continues: Tensor | None = None,
    ) -> Tensor:
        """Return the values of Q tokens behind what is kept.

        Args:
            token_ids: (Q,)
            positions: (Q,) position of each token in its own prompt: the length of its prefix, or more.
            attends: (Q, Q) bool, whether token i attends to packed token j; None: to itself alone.
            lanes: (Q,) whose prefix each token continues, 0 or more; None: lane 0.
            continues: (Q, P) bool, the kept tokens that each token continues, where lanes do not tell: prefixes
                that share tokens.

        Returns:
            (Q, W)
        """
        return self._model.run_packed(token_ids, self._placed(positions, attends, lanes, continues))

    def run_at(self, token_ids: Tensor, positions: Tensor, cuts: Sequence[tuple[int, bool]]) -> list[Tensor]:
        """As `run`, each token alone behind the prefix, at several (layer, is_final) cuts. (Q, D) each.

        The model itself is cut at a plain site.
        """
        return self._model.run_packed_at(token_ids, self._placed(positions), cuts)

    def run_embeddings(self, embeddings: Tensor, positions: Tensor, *, lanes: Tensor | None = None) -> Tensor:
        """As `run`, from embedding vectors (Q, D), each alone behind its prefix; differentiable."""
        return self._model.run_packed_embeddings(embeddings, self._placed(positions, lanes=lanes))

    def _placed(
        self,
        positions: Tensor,
        attends: Tensor | None = None,
        lanes: Tensor | None = None,
        continues: Tensor | None = None,
    ) -> Placed:
        n_packed = len(positions)
        self._packed_positions = positions.cpu()
        self._packed_lanes = torch.zeros(n_packed, dtype=torch.long) if lanes is None else lanes.cpu()
        own = torch.eye(n_packed, dtype=torch.bool) if attends is None else attends.cpu()  # (Q, Q)
        kept = self._packed_lanes[:, None] == self._lanes if continues is None else continues.cpu()  # (Q, P)
        return Placed(
            cache=self._cache,
            positions=positions,
            places=torch.cat([self._positions, self._packed_positions]),
            visible=torch.cat([kept, own], dim=1),
        )

    def extend(self, token_ids: Tensor, *, position: int | None = None, lane: int = 0) -> Tensor:
        """Run tokens as a text that goes on behind the prefix of a lane, and keep them. (N,) → (N, W).

        Args:
            token_ids: (N,)
            position: of the first; None: where the only lane ends.
            lane: whose prefix goes on.
        """
        n = len(token_ids)
        start = self.length if position is None else position
        places = torch.arange(start, start + n)
        values = self.run(token_ids, places, in_turn(n), lanes=torch.full((n,), lane))
        self.keep(range(n))
        return values

    def keep(self, columns: Sequence[int]) -> None:
        """Append the given tokens of the last pass to the prefixes of their lanes, in this order."""
        self._cache.keep(columns)
        self._lanes = torch.cat([self._lanes, self._packed_lanes[list(columns)]])
        self._positions = torch.cat([self._positions, self._packed_positions[list(columns)]])

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens kept."""
        self.select(torch.arange(min(length, self.length)))

    def forget(self, lane: int, position: int) -> None:
        """Forget the tokens of one lane from a position on."""
        self.select((~((self._lanes == lane) & (self._positions >= position))).nonzero()[:, 0])

    def drop(self, lane: int) -> None:
        """Forget one lane. Its columns are given back once they and others dropped are half of all."""
        self._lanes = self._lanes.masked_fill(self._lanes == lane, _NO_LANE)
        alive = (self._lanes != _NO_LANE).nonzero()[:, 0]
        if 2 * len(alive) <= self.length:
            self.select(alive)

    def select(self, columns: Tensor) -> None:
        """Keep some of the kept tokens, in their order, and forget the others. (N,)."""
        self._cache.select(columns)
        self._lanes, self._positions = self._lanes[columns], self._positions[columns]


def in_turn(n: int) -> Tensor:
    """Return who attends whom in a text: each token to those before it and to itself. (n, n) bool."""
    return torch.ones(n, n, dtype=torch.bool).tril()
