"""What rows leave along the directions in which the states of tokens differ, where a wrong token leaves itself.

Shapes: T rows, D = their width, N differences of two tokens' rows, K directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARES = (0.5, 0.7, 0.9)  # of how tokens differ: what sets of directions hold along which a missed token is sought


@dataclass(frozen=True, kw_only=True, eq=False)
class Along:
    """The energy of rows along some directions, with the first two moments that noise gives it. (T,) each."""

    energy: Tensor
    mean: Tensor
    half_variance: Tensor

    @classmethod
    def of(cls, z: Tensor, kept: Tensor, along: Tensor) -> Along:
        """Return those of residuals of which some coordinates are kept. (T, D), (T, D), (D, K)."""
        overlaps = [(along.T * row) @ along for row in kept.to(along)]  # T of (K, K)
        return cls(
            energy=(z @ along).square().sum(dim=1),
            mean=torch.stack([each.trace() for each in overlaps]).clamp(min=1e-300),
            half_variance=torch.stack([each.square().sum() for each in overlaps]).clamp(min=1e-300),
        )

    def in_all(self) -> Along:
        """Return that of all rows together: () each."""
        return Along(energy=self.energy.sum(), mean=self.mean.sum(), half_variance=self.half_variance.sum())

    def deviations(self) -> Tensor:
        """Return how many standard deviations of a normal law each energy lies above what noise leaves.

        By the cube root of Wilson and Hilferty (1931), of a chi-square law with the same two moments.
        """
        spread = 2 * self.half_variance / (9 * self.mean.square())
        found: Tensor = ((self.energy / self.mean).pow(1 / 3) - (1 - spread)) / spread.sqrt()
        return found


def directions(differences: Tensor, held: Sequence[float]) -> list[Tensor]:
    """Return the directions along which differences are longest, by the shares of energy that they hold.

    (N, D) → (D, K) each
    """
    n, width = differences.shape
    if n >= width:
        return directions_of(differences.T @ differences, held)
    values, vectors = torch.linalg.eigh(differences @ differences.T)
    return _longest(values, differences.T @ (vectors * values.clamp(min=1e-300).rsqrt()), held)


def directions_of(gram: Tensor, held: Sequence[float]) -> list[Tensor]:
    """As `directions`, of the inner products of coordinates over all differences. (D, D) → (D, K) each."""
    values, vectors = torch.linalg.eigh(gram)
    return _longest(values, vectors, held)


def _longest(values: Tensor, vectors: Tensor, held: Sequence[float]) -> list[Tensor]:
    """Return the last columns of vectors, so many that their values are a share of all. (M,), (D, M) → (D, K) each."""
    share = values.flip(0).cumsum(dim=0) / values.sum().clamp(min=1e-300)
    return [vectors.flip(1)[:, : int((share < each).sum()) + 1] for each in held]
