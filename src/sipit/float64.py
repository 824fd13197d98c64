"""Where float64 is computed: on a tensor's own device, or on the CPU where that device has no such dtype.

Apple's GPUs (mps) have none: converting there is an error. What decides a verdict is computed in float64, so it moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT = ("mps",)  # device types that have no float64


def has_float64(device: torch.device) -> bool:
    """Return whether a device can hold float64."""
    return device.type not in _WITHOUT


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 values that belong to a device are held: there, or on the CPU."""
    return device if has_float64(device) else torch.device("cpu")


def as_float64(values: Tensor) -> Tensor:
    """Return values in float64, on the CPU where their device has no such dtype."""
    return values.to(float64_device(values.device)).double()
