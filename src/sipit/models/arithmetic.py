"""What a model computes in, which under autocast its weights do not tell."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

AUTOCAST = {"autocast-bfloat16": torch.bfloat16, "autocast-float16": torch.float16}


def under_autocast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a shallow copy of a module whose forward pass runs under `torch.autocast` in a dtype."""
    kind: Any = type(module)

    class _UnderAutocast(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast(next(self.parameters()).device.type, dtype=dtype):
                return super().forward(*args, **kwargs)

    for name in ("__module__", "__name__", "__qualname__"):  # by which transformers knows what a class gives out
        setattr(_UnderAutocast, name, getattr(kind, name))
    copied = copy.copy(module)
    copied.__class__ = _UnderAutocast
    copied.__dict__["autocast_dtype"] = dtype
    return copied


def arithmetic_of(trunk: nn.Module) -> str:
    """Return the name of what a model computes in: its dtype, or "autocast-" and another."""
    weights = str(next(trunk.parameters()).dtype).removeprefix("torch.")
    return next((name for name, dtype in AUTOCAST.items() if dtype == _autocast(trunk)), weights)


def rounding_of(trunk: nn.Module) -> float:
    """Return the largest relative error of one rounding in a model's products."""
    return torch.finfo(_autocast(trunk) or next(trunk.parameters()).dtype).eps


def _autocast(trunk: nn.Module) -> torch.dtype | None:
    return getattr(trunk, "autocast_dtype", None)
