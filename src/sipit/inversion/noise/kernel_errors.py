"""What a map from tokens to rows misses, learned from tokens that were run: a regression with an arc-cosine kernel.

Shapes: N tokens that were run, M others, S = width of rows as compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.inverses.kernel_regression import arc_cosine_kernel

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelErrors:
    """Errors of a map, by what the map says of a token."""

    features: Tensor  # (N, S)
    coefficients: Tensor  # (N, S)
    left_out: Tensor  # (N, S) of each error, what the regression from all others misses of it

    def predicted(self, features: Tensor) -> Tensor:
        """Return the errors of other tokens. (M, S) → (M, S)."""
        return arc_cosine_kernel(features, self.features) @ self.coefficients


def kernel_errors(features: Tensor, errors: Tensor, *, strengths: Sequence[float]) -> KernelErrors:
    """Return the ridge regression from features to errors, of the strength that misses least of what it leaves out.

    Args:
        features: (N, S), standardised.
        errors: (N, S), their mean taken away.
        strengths: of the ridge, over the mean of the kernel's diagonal.
    """
    gram = arc_cosine_kernel(features, features).cpu()
    tried = [_solved(gram, features, errors, strength) for strength in strengths]
    return min(tried, key=lambda one: float(one.left_out.square().sum()))


def _solved(gram: Tensor, features: Tensor, errors: Tensor, strength: float) -> KernelErrors:
    ridged = gram.clone()
    ridged.diagonal().add_(strength * gram.diagonal().mean() + _TINY)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged)).to(errors)
    coefficients = inverse @ errors
    left_out = coefficients / inverse.diagonal()[:, None]
    return KernelErrors(features=features, coefficients=coefficients, left_out=left_out)


@dataclass(frozen=True, kw_only=True, eq=False)
class Standard:
    """Where rows lie and how far apart, coordinate by coordinate."""

    mean: Tensor  # (S,)
    scale: Tensor  # (S,)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return standardised rows. (N, S)."""
        return (rows - self.mean) / self.scale


def standard_of(rows: Tensor) -> Standard:
    """Return the standard by which rows are compared. (N, S)."""
    spread = rows.std(dim=0)
    return Standard(mean=rows.mean(dim=0), scale=spread + 1e-3 * spread.max() + _TINY)
