"""What was checked at one position, and what of it is nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.check import Checked


@dataclass(frozen=True)
class Best:
    """The nearest candidate of those checked at one position."""

    token_id: int
    distance: float
    fits: bool
    is_near: bool


class Tried:
    """The candidates checked at one position."""

    def __init__(self, vocab_size: int) -> None:
        self.untried = torch.ones(vocab_size, dtype=torch.bool)  # (V,)
        self._ids: list[Tensor] = []
        self._distances: list[Tensor] = []
        self._fits: list[Tensor] = []
        self._near: list[Tensor] = []

    @property
    def n_checked(self) -> int:
        return int((~self.untried).sum())

    def add(self, checked: Checked) -> None:
        self.untried[checked.token_ids] = False
        self._ids.append(checked.token_ids.cpu())
        self._distances.append(checked.distances.cpu())
        self._fits.append(checked.fits.cpu())
        self._near.append(checked.is_near.cpu())

    def best(self) -> Best:
        """Return the nearest token that may be accepted, else the nearest of all."""
        ids, distances, fits, near = self._all()
        among = near if bool(near.any()) else torch.ones_like(near)
        i = int(distances.masked_fill(~among, torch.inf).argmin())
        return Best(int(ids[i]), float(distances[i]), bool(fits[i]), bool(near[i]))

    def runner_up(self, token_id: int) -> float | None:
        """Return the distance of the nearest other token checked."""
        ids, distances, _, _ = self._all()
        others = distances[ids != token_id]
        return float(others.min()) if len(others) else None

    def rivals(self, token_id: int) -> list[tuple[int, float]]:
        """Return other tokens that may be accepted too, the nearest first."""
        ids, distances, _, near = self._all()
        keep = near & (ids != token_id)
        order = distances[keep].argsort(stable=True)
        found: dict[int, float] = {}  # a token that was run again beside others stands here once, as it was nearest
        for i, d in zip(ids[keep][order].tolist(), distances[keep][order].tolist(), strict=True):
            found.setdefault(int(i), float(d))
        return list(found.items())

    def take_back(self, distance: float) -> Tensor:
        """Forget the tokens tried within a distance, as if they had not been; return them, nearest first. (N,)."""
        ids, distances, fits, near = self._all()
        far = distances > distance
        self._ids, self._distances, self._fits, self._near = [ids[far]], [distances[far]], [fits[far]], [near[far]]
        back = ids[~far][distances[~far].argsort()]
        self.untried[back] = True
        return back

    def _all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.cat(self._ids),
            torch.cat(self._distances),
            torch.cat(self._fits),
            torch.cat(self._near),
        )
