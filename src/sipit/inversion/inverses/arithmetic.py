"""Whether a machine computes fast in bfloat16 or 8-bit integers. A proposal does not feel it; a check would."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_MOST_INT8 = 127


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


def is_fast_in_int8(device: torch.device) -> bool:
    """Return whether matrix products of 8-bit integers are much faster here than in float32."""
    return device.type == "cpu" and _cpu_has("avx512_vnni") and hasattr(torch, "_int_mm")


class Int8Matrix:
    """A matrix in 8-bit integers, with a scale a row.

    Args:
        parts: its rows, some at a time, as `in_int8` gives them.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._rows = torch.cat([rows for rows, _ in parts])  # (V, K)
        self._scales = torch.cat([scales for _, scales in parts])  # (V,)

    def product(self, vectors: Tensor) -> Tensor:
        """Return the inner product of each vector with every row, both rounded. (N, K) → (N, V) float32."""
        rounded, scales = in_int8(vectors)
        return torch._int_mm(rounded, self._rows.T).float().mul_(self._scales).mul_(scales[:, None])


def in_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in 8-bit integers, and their scales. (N, K) → (N, K), (N,)."""
    scales = rows.float().abs().amax(dim=1).clamp(min=1e-30) / _MOST_INT8
    return (rows / scales[:, None]).round().to(torch.int8), scales


def _cpu_has_bfloat16() -> bool:
    return _cpu_has("avx512_bf16")


@cache
def _cpu_has(feature: str) -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and feature in flags.read_text(errors="ignore")
