"""What was checked at one position, and what of it is nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.evidence.result import MOST_RIVALS, Candidate
from sipit.inversion.judging.check import Checked
from sipit.models import LanguageModel


@dataclass(frozen=True)
class Best:
    """The nearest candidate of those checked at one position."""

    token_id: int
    distance: float
    fits: bool
    is_near: bool


class Trials:
    """The candidates checked at one position."""

    def __init__(self, vocab_size: int) -> None:
        self.untried = torch.ones(vocab_size, dtype=torch.bool)  # (V,)
        self.n_checked = 0  # tokens, each counted once
        self._ids = torch.empty(0, dtype=torch.long)  # (N,) of all outcomes
        self._distances = torch.empty(0)
        self._fits = self._near = torch.empty(0, dtype=torch.bool)

    def add(self, checked: Checked) -> None:
        ids = checked.token_ids.cpu()
        self.n_checked += int(self.untried[ids].sum())
        self.untried[ids] = False
        old = (self._ids, self._distances, self._fits, self._near)
        new = (ids, checked.distances.cpu(), checked.fits.cpu(), checked.is_near.cpu())
        both = [torch.cat(pair) for pair in zip(old, new, strict=True)] if len(self._ids) else new
        self._ids, self._distances, self._fits, self._near = both

    def best(self) -> Best:
        """Return the nearest token that may be accepted, else the nearest of all."""
        distances = self._distances.masked_fill(~self._near, torch.inf) if bool(self._near.any()) else self._distances
        i = int(distances.argmin())
        return Best(int(self._ids[i]), float(self._distances[i]), bool(self._fits[i]), bool(self._near[i]))

    def nearest(self, n: int) -> list[int]:
        """Return the nearest tokens checked, the nearest first."""
        order = self._distances.argsort(stable=True)
        return list(dict.fromkeys(self._ids[order].tolist()))[:n]

    def runner_up(self, token_id: int) -> float | None:
        """Return the distance of the nearest other token checked."""
        if self.n_checked < 2:
            return None
        return float(self._distances[self._ids != token_id].min())

    def rivals(self, token_id: int, *, within: float = 0.0) -> list[tuple[int, float]]:
        """Return other tokens that may be accepted too, or lie within a distance, the nearest first."""
        if self.n_checked < 2:
            return []
        keep = (self._near | (self._distances <= within)) & (self._ids != token_id)
        order = self._distances[keep].argsort(stable=True)
        found: dict[int, float] = {}  # a token that was run again beside others stands here once, as it was nearest
        for i, d in zip(self._ids[keep][order].tolist(), self._distances[keep][order].tolist(), strict=True):
            found.setdefault(int(i), float(d))
        return list(found.items())

    def take_back(self, distance: float) -> Tensor:
        """Forget the tokens tried within a distance, as if they had not been; return them, nearest first. (N,)."""
        far = self._distances > distance
        back = self._ids[~far][self._distances[~far].argsort()]
        self._ids, self._distances = self._ids[far], self._distances[far]
        self._fits, self._near = self._fits[far], self._near[far]
        self.n_checked -= int((~self.untried[back.unique()]).sum())
        self.untried[back] = True
        return back


def named(lm: LanguageModel, rivals: Sequence[tuple[int, float]]) -> tuple[Candidate, ...]:
    """Return other tokens that fit, (token id, distance) each, as evidence names them: the first few."""
    return tuple(Candidate(token_id=i, token=lm.decode([i]), distance=d) for i, d in rivals[:MOST_RIVALS])
