"""The rows of the input embedding: fetched in bounded slices, multiplied, compared for near-equality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

_SLICE = 8192  # rows at a time
_NEAR = 1e-4  # rows closer than this fraction of their norm are worth telling apart by a check
_MAX_TWINS = 64  # of one token
_PROJECTIONS = 8
_WIDE = 0.5  # radius, over the spread of rows along one direction, from which projections tell few of them apart
_PRODUCT_ERROR = 64.0  # roundings of a product's factors that a product may be off by, at most


class EmbeddingRows:
    """Read access to what a model's embedding module returns for each token. Copies no whole table."""

    def __init__(self, module: nn.Embedding, vocab_size: int) -> None:
        self._module = module
        self.vocab_size = vocab_size
        self._indexes: dict[bool, _Index] = {}  # by whether the rows' means are removed

    @torch.no_grad()
    def rows(self, token_ids: Tensor) -> Tensor:
        """Return the embedding vectors of the given tokens. (N,) → (N, D)."""
        out: Tensor = self._module(token_ids.to(self._module.weight.device))
        return out

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first token, rows) over the whole vocabulary, a bounded slice at a time."""
        for first in range(0, self.vocab_size, _SLICE):
            yield first, self.rows(torch.arange(first, min(first + _SLICE, self.vocab_size)))

    @torch.no_grad()
    def products(self, vectors: Tensor) -> Tensor:
        """Return the inner product of each vector with every token's row. (N, D) → (N, V)."""
        weight = self._module.weight
        if self._scale is not None:
            return nn.functional.linear(vectors.to(weight), weight).to(vectors) * self._scale
        return torch.cat([vectors @ rows.to(vectors).T for _, rows in self.slices()], dim=1)

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._module.weight.device

    @property
    def product_error(self) -> float:
        """How far `products` may be off, over the product of the lengths."""
        return _PRODUCT_ERROR * torch.finfo(self._module.weight.dtype).eps

    def squared_distances(self, vector: Tensor) -> Tensor:
        """Return the squared L2 distance of every token's row to one vector. (D,) → (V,)."""
        return torch.cat([(rows - vector).square().sum(dim=1) for _, rows in self.slices()])

    def within(self, token_id: int, radius: float, *, ignores_mean: bool = False) -> list[int]:
        """Return other tokens whose rows lie within a radius of this one's, the nearest first, at most 64.

        Args:
            token_id: the token.
            radius: L2, in units of the rows.
            ignores_mean: compare the rows less their own means: behind a LayerNorm a constant added to
                every coordinate is gone.
        """
        if ignores_mean not in self._indexes:
            self._indexes[ignores_mean] = _Index(self, ignores_mean)
        return self._indexes[ignores_mean].within(token_id, radius)

    def near_by(self, token_id: int, others: Sequence[int], radius: float) -> list[int]:
        """Return those of some tokens whose rows lie within a radius of this one's, in their order."""
        rows = self.rows(torch.tensor([token_id, *others])).float()
        return [i for i, gap in zip(others, (rows[1:] - rows[0]).norm(dim=1).tolist(), strict=True) if gap <= radius]

    def is_quick(self, radius: float) -> bool:
        """Whether `within` looks at few rows for such a radius, and not at all of them."""
        return radius < _WIDE * self._typical

    def twins(self, token_id: int) -> list[int]:
        """Return other tokens whose rows nearly equal this one's, the nearest first, at most 64.

        Equal rows give equal states whatever the model, so no observation can tell them apart.
        """
        return self._twins.get(token_id, [])

    @property
    def spread(self) -> float:
        """How far a row lies from the mean of all, about, in L2."""
        return self._typical * float(self._module.embedding_dim**0.5)

    @cached_property
    def _typical(self) -> float:
        """The length of a row by one coordinate, about: how far apart two rows lie along one direction."""
        step = max(1, self.vocab_size // _SLICE)
        rows = self.rows(torch.arange(0, self.vocab_size, step)).float()
        return float((rows - rows.mean(dim=0)).square().mean().sqrt())

    @cached_property
    def _scale(self) -> float | None:
        """What the module multiplies its weights by; None if it does more than that."""
        ids = torch.arange(min(8, self.vocab_size))
        rows, weights = self.rows(ids).float(), self._module.weight.detach()[: len(ids)].float()
        scale = float((rows * weights).sum() / weights.square().sum().clamp(min=1e-30))
        error = float((rows - scale * weights).norm() / rows.norm().clamp(min=1e-30))
        return scale if error < 1e-2 else None

    @cached_property
    def _twins(self) -> dict[int, list[int]]:
        """Every token's twins. Close rows have close projections, so only those near by are compared."""
        width = self.rows(torch.zeros(1, dtype=torch.long)).shape[1]
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(width, _PROJECTIONS, generator=generator)
        directions = (directions / directions.norm(dim=0)).to(self._module.weight.device)
        parts = [(rows.float() @ directions, rows.float().norm(dim=1)) for _, rows in self.slices()]
        places = torch.cat([part[0] for part in parts]).cpu()  # (V, P)
        reach = torch.cat([part[1] for part in parts]).cpu() * _NEAR  # (V,)
        order = places[:, 0].argsort()
        places = places[order]
        first, second, others = places[:, 0].clone(), places[:, 1].clone(), places[:, 2:]
        slack = reach[order] + 1e-5 * places.abs().amax(dim=1) + 1e-12  # (V,)
        none = torch.empty(0, dtype=torch.long)
        found: list[tuple[Tensor, Tensor]] = [(none, none)]
        count = torch.zeros(self.vocab_size, dtype=torch.long)
        for offset in range(1, self.vocab_size):  # whole rows at a time: far faster than gathering those in reach
            in_reach = (first[offset:] - first[:-offset] <= slack[:-offset]) & (count[:-offset] < _MAX_TWINS)
            if not bool(in_reach.any()):
                break
            left = (in_reach & ((second[offset:] - second[:-offset]).abs() <= slack[:-offset])).nonzero()[:, 0]
            left = left[((others[left + offset] - others[left]).abs() <= slack[left, None]).all(dim=1)]
            found.append((order[left], order[left + offset]))
            count[left] += 1
        return self._confirmed(torch.cat([a for a, _ in found]), torch.cat([b for _, b in found]))

    def _confirmed(self, left: Tensor, right: Tensor) -> dict[int, list[int]]:
        """Keep the pairs whose rows really are near. (N,), (N,) → token → its twins by distance."""
        near: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for a, b in zip(torch.split(left, _SLICE), torch.split(right, _SLICE), strict=True):
            rows = self.rows(a).cpu().double()
            gaps = (rows - self.rows(b).cpu().double()).norm(dim=1)
            keep = gaps <= _NEAR * rows.norm(dim=1)
            for one, two, gap in zip(a[keep].tolist(), b[keep].tolist(), gaps[keep].tolist(), strict=True):
                near[one].append((gap, two))
                near[two].append((gap, one))
        return {token: [other for _, other in sorted(pairs)[:_MAX_TWINS]] for token, pairs in near.items()}


class _Index:
    """Finds the rows near one of them: near rows have near projections, so only those are compared."""

    def __init__(self, rows: EmbeddingRows, ignores_mean: bool) -> None:
        self._rows = rows
        self._ignores_mean = ignores_mean
        width = rows.rows(torch.zeros(1, dtype=torch.long)).shape[1]
        directions = torch.randn(width, _PROJECTIONS, generator=torch.Generator().manual_seed(0))
        directions -= directions.mean(dim=0) if ignores_mean else 0.0
        directions /= directions.norm(dim=0)
        places = torch.cat([(part.float().cpu() @ directions) for _, part in rows.slices()])  # (V, P)
        self._order = places[:, 0].argsort()  # (V,)
        self._ranks = self._order.argsort()  # (V,)
        self._first, self._others = places[self._order, 0].contiguous(), places[self._order, 1:].contiguous()
        self._slack = 1e-5 * float(places.abs().max()) + 1e-12  # of the projections' own rounding

    def within(self, token_id: int, radius: float) -> list[int]:
        if not self._rows.is_quick(radius):
            return self._within_wide(token_id, radius)
        rank = int(self._ranks[token_id])
        reach = radius + self._slack
        first = int(torch.searchsorted(self._first, self._first[rank] - reach))
        last = int(torch.searchsorted(self._first, self._first[rank] + reach, right=True))
        in_reach = ((self._others[first:last] - self._others[rank]).abs() <= reach).all(dim=1)
        near_by = self._order[first:last][in_reach]
        return self._confirmed(token_id, near_by, radius) if len(near_by) > 1 else []

    @cached_property
    def _squares(self) -> Tensor:
        """The squared length of every row. (V,)."""
        parts = (part.float() for _, part in self._rows.slices())
        if self._ignores_mean:
            parts = (part - part.mean(dim=1, keepdim=True) for part in parts)
        return torch.cat([part.square().sum(dim=1).cpu() for part in parts])

    def _within_wide(self, token_id: int, radius: float) -> list[int]:
        """The same where projections tell little: by products with all rows, and exactly for those near by them."""
        here = self._row(torch.tensor([token_id])).float()  # (1, D); where means are removed, no other mean matters
        both = self._squares + here.square().sum()  # (V,)
        gaps = both - 2 * self._rows.products(here.to(self._rows.device))[0].cpu()
        near_by = (gaps <= radius**2 + self._rows.product_error * both).nonzero()[:, 0]
        return self._confirmed(token_id, near_by, radius)

    def _confirmed(self, token_id: int, near_by: Tensor, radius: float) -> list[int]:
        here = self._row(torch.tensor([token_id]))[0]
        found: list[tuple[float, int]] = []
        for part in near_by.split(_SLICE):
            gaps = (self._row(part) - here).norm(dim=1)
            near = (gaps <= radius) & (part != token_id)
            found += zip(gaps[near].tolist(), part[near].tolist(), strict=True)
        return [other for _, other in sorted(found)[:_MAX_TWINS]]

    def _row(self, token_ids: Tensor) -> Tensor:
        rows = self._rows.rows(token_ids).cpu().double()
        return rows - rows.mean(dim=1, keepdim=True) if self._ignores_mean else rows
