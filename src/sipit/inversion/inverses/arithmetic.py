"""Whether a machine computes fast in bfloat16. A proposal does not feel the difference; a check would."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


def fast_arithmetic(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context that computes with float32 weights in bfloat16 where that is fast, and changes nothing else.

    Args:
        device: where the weights live.
        dtype: of the weights; with any but float32 the context is off, for float16 and bfloat16 do not mix.
    """
    is_on = dtype == torch.float32 and is_fast_in_bfloat16(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_on)


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Return whether matrix products in bfloat16 are much faster here than in float32."""
    return device.type == "cuda" or (device.type == "cpu" and _cpu_has_bfloat16())


@cache
def _cpu_has_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "avx512_bf16" in flags.read_text(errors="ignore")
