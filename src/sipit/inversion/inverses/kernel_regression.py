"""Regression from states to token keys by an arc-cosine kernel: a wide layer of rectified units, in closed form.

With as few states as a closed-form inverse is made of, it reads text of any other kind better than a linear map does.
Source: Cho and Saul, Kernel Methods for Deep Learning, 2009: the kernel of order 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sipit.inversion.inverses.network import unit_rms

_RIDGE = 0.2  # of the mean of the kernel's diagonal
_TINY = 1e-12  # keeps states that are all the same from dividing by zero


@dataclass(frozen=True, kw_only=True)
class KernelRegression:
    """A map from states to keys through the kernel's values at N anchors."""

    mean: Tensor  # (D,) of states at unit root mean square
    scale: Tensor  # (D,)
    anchors: Tensor  # (N, D) standardised
    coefficients: Tensor  # (N, K)
    bias: Tensor  # (K,)

    def __call__(self, states: Tensor) -> Tensor:
        """Return unit queries. (N, D) → (N, K)."""
        return nn.functional.normalize(self.predicted(states), dim=1)

    def predicted(self, states: Tensor) -> Tensor:
        """Return what the map gives, of any length. (N, D) → (N, K)."""
        return arc_cosine_kernel(self.standardised(states), self.anchors) @ self.coefficients + self.bias

    def standardised(self, states: Tensor) -> Tensor:
        """Return states as the kernel compares them. (N, D) → (N, D)."""
        return (unit_rms(states) - self.mean) / self.scale


def kernel_regression(states: Tensor, keys: Tensor, strength: float = _RIDGE) -> KernelRegression:
    """Return the ridge regression from states to keys in the kernel's space. (N, D), (N, K)."""
    states = unit_rms(states)
    mean, scale = states.mean(dim=0), states.std(dim=0)
    scale = scale + 1e-3 * scale.max() + _TINY
    anchors = (states - mean) / scale
    bias = keys.mean(dim=0)
    coefficients = kernel_coefficients(anchors, keys - bias, strength)
    return KernelRegression(mean=mean, scale=scale, anchors=anchors, coefficients=coefficients, bias=bias)


def kernel_coefficients(anchors: Tensor, wanted: Tensor, strength: float) -> Tensor:
    """Return by what the kernel's values at the anchors are multiplied to give what is wanted. (N, D), (N, K) → (N, K).

    Args:
        anchors: (N, D)
        wanted: (N, K) at each of them.
        strength: of the ridge, over the mean of the kernel's diagonal.
    """
    gram = arc_cosine_kernel(anchors, anchors).cpu()
    gram.diagonal().add_(strength * gram.diagonal().mean() + _TINY)
    return torch.cholesky_solve(wanted.cpu(), torch.linalg.cholesky(gram)).to(wanted).contiguous()


def arc_cosine_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return |a||b| (sin t + (π - t) cos t) / (π D), t the angle between them. (N, D), (M, D) → (N, M)."""
    lengths = a.norm(dim=1)[:, None] * b.norm(dim=1)[None]  # (N, M)
    cosines = (a @ b.T).div_(lengths.clamp(min=_TINY)).clamp_(-1, 1)
    angles = cosines.acos()
    return angles.sin().add_(cosines.mul_(math.pi - angles)).mul_(lengths).div_(math.pi * a.shape[1])
