"""The linear map that makes rows white."""

from __future__ import annotations

import torch
from torch import Tensor


def whitening(covariance: Tensor, floor: float) -> Tensor:
    """Return the symmetric W for which rows @ W are white, of rows with this covariance. (D, D) → (D, D) float32.

    Args:
        covariance: float64, symmetric, on the CPU: other devices may lack the dtype.
        floor: of the mean eigenvalue, added to each, so that directions without spread are not blown up.
    """
    values, basis = torch.linalg.eigh(covariance)
    gain = (values.clamp(min=0) + floor * values.mean()).rsqrt()
    symmetric: Tensor = (basis * gain) @ basis.T
    return symmetric.float()
