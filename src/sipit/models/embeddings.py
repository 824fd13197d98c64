"""The rows of the input embedding: fetched in bounded slices, and compared for near-equality."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

_SLICE = 8192  # rows at a time
_NEAR = 1e-3  # rows closer than this fraction of their norm are worth telling apart by a check
_MAX_TWINS = 64


class EmbeddingRows:
    """Read access to what a model's embedding module returns for each token. Copies no whole table."""

    def __init__(self, module: nn.Module, vocab_size: int) -> None:
        self._module = module
        self.vocab_size = vocab_size

    @torch.no_grad()
    def rows(self, token_ids: Tensor) -> Tensor:
        """Return the embedding vectors of the given tokens. (N,) → (N, D)."""
        device = next(self._module.parameters()).device
        out: Tensor = self._module(token_ids.to(device))
        return out

    def squared_distances(self, vector: Tensor) -> Tensor:
        """Return the squared L2 distance of every token's row to one vector. (D,) → (V,)."""
        return torch.cat([(rows - vector).square().sum(dim=1) for _, rows in self.slices()])

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first token, rows) over the whole vocabulary, a bounded slice at a time."""
        for first in range(0, self.vocab_size, _SLICE):
            yield first, self.rows(torch.arange(first, min(first + _SLICE, self.vocab_size)))

    def twins(self, token_id: int) -> list[int]:
        """Return other tokens whose rows nearly equal this one's, the nearest first, at most 64.

        Equal rows give equal states whatever the model, so no observation can tell them apart.
        Found through one random projection: close rows have close projections.
        """
        direction, projection, order = self._index
        row = self.rows(torch.tensor([token_id]))[0].double()  # (D,)
        reach = _NEAR * float(row.norm())
        centre = float(row @ direction)
        slack = reach + 1e-9 * (1 + abs(centre))
        ends = projection.new_tensor([centre - slack, centre + slack])
        low, high = torch.searchsorted(projection, ends).tolist()
        near = order[low : high + 1]
        near = near[near != token_id]
        if near.numel() == 0:
            return []
        gaps = (self.rows(near).double() - row).norm(dim=1)
        found = gaps.argsort(stable=True)[:_MAX_TWINS]
        return [int(near[i]) for i in found if float(gaps[i]) <= reach]

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor, Tensor]:
        """A direction (D,), the rows' projections on it, sorted (V,), and the tokens in that order (V,)."""
        width = self.rows(torch.zeros(1, dtype=torch.long)).shape[1]
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(width, generator=generator, dtype=torch.float64)
        direction = (direction / direction.norm()).to(next(self._module.parameters()).device)
        projection, order = torch.cat([rows.double() @ direction for _, rows in self.slices()]).sort()
        return direction, projection, order
