"""Linear maps with their weights laid out once for the CPU's kernels, where that is much faster.

A packed pass has few rows, and an ordinary float32 product copies the whole weight into its kernel's
layout at each call: on some processors that is most of the time. States differ from ordinary ones by
rounding, as those of any other kernel do; the noise floor is measured with these.
"""

from __future__ import annotations

import copy
import threading
import weakref
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sipit.models.shallow import rewritten

_MOST_BYTES = 1 << 30  # of weights laid out in one process: a second copy of them
_LARGEST = 1 << 29  # one weight: a head over a large vocabulary in float32 would leave no room for the blocks
_ROWS = 64  # that the layout is chosen for; fewer and more do well with it

_Layouts = dict[torch.dtype, tuple[int, Tensor]]  # dtype of the product → version of the weight, its layout
_layouts: weakref.WeakKeyDictionary[nn.Module, _Layouts] = weakref.WeakKeyDictionary()
_laying_out = threading.Lock()  # no thread counts what is held while another adds to it


class _Linear(nn.Linear):
    """A linear map that shares its weight with the caller's, and multiplies by its laid-out copy."""

    source: nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        layout = _layout(self.source, self.weight, input)
        return super().forward(input) if layout is None else _product(input, layout, self.bias)


class _Conv1D(Conv1D):
    """As `_Linear`, for the layer in which GPT-2 keeps its weights transposed."""

    source: Any

    def forward(self, input: Tensor) -> Any:
        layout = _layout(self.source, self.weight.T, input)
        return cast(Any, super()).forward(input) if layout is None else _product(input, layout, self.bias)


def prepacked(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module whose linear maps use laid-out weights; the module itself if it has none."""
    return rewritten(module, _with_layout)


def _with_layout(module: nn.Module) -> nn.Module:
    if type(module) not in (nn.Linear, Conv1D):
        return module
    fast = copy.copy(module)
    fast.__class__ = _Linear if type(module) is nn.Linear else _Conv1D
    fast.__dict__["source"] = module
    return fast


def drop_prepacked(module: nn.Module) -> None:
    """Give the laid-out weights of a module back; they are made again when they are used."""
    with _laying_out:
        for part in module.modules():
            _layouts.pop(part, None)


class PrepackedMatrix:
    """A matrix laid out once for products with it, where that is possible. (out, in)."""

    def __init__(self, matrix: Tensor) -> None:
        can = matrix.device.type == "cpu" and _serves(matrix.dtype)
        self._layout = _reordered(matrix) if can else None
        self._plain = None if can else matrix

    def product(self, rows: Tensor) -> Tensor:
        """Return the inner product of each row with each row of the matrix, in its dtype. (N, in) → (N, out)."""
        if self._layout is not None:
            return _product(rows, self._layout, None)
        assert self._plain is not None
        return rows.to(self._plain.dtype) @ self._plain.T


def _product(rows: Tensor, layout: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(layout.dtype)
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(rows.to(layout.dtype), layout, bias, "none", [], ""))


def _reordered(matrix: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), _ROWS))


def _layout(source: nn.Module, weight: Tensor, rows: Tensor) -> Tensor | None:
    """Return the laid-out weight (out, in), made on first use and again if it was changed; None to go without."""
    dtype = _product_dtype(weight, rows)
    if dtype is None:
        return None
    version = weight._version
    known = _layouts.get(source, {}).get(dtype)
    if known is not None and known[0] == version:
        return known[1]
    n_bytes = dtype.itemsize * weight.numel()
    with _laying_out:
        if known is None and (n_bytes > _LARGEST or _held_bytes() + n_bytes > _MOST_BYTES):
            return None
        made = _reordered(weight.to(dtype))
        _layouts.setdefault(source, {})[dtype] = (version, made)
    return made


def _product_dtype(weight: Tensor, rows: Tensor) -> torch.dtype | None:
    """Return what the plain product would be computed in, if that is a dtype laid-out weights serve."""
    if rows.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_grad_enabled():
        return None
    dtype, taken = torch.float32, {torch.float32}
    if torch.is_autocast_enabled("cpu"):
        dtype, taken = torch.get_autocast_dtype("cpu"), {torch.float32, torch.bfloat16}
    is_served = dtype in (torch.float32, torch.bfloat16) and rows.dtype in taken
    return dtype if is_served and _serves(dtype) else None


def _held_bytes() -> int:
    return sum(held.nbytes for layouts in _layouts.values() for _, held in layouts.values())


@cache
def _serves(dtype: torch.dtype) -> bool:
    """Whether this build and this processor lay weights of a dtype out; bfloat16 takes AVX-512 or the like."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    try:
        _reordered(torch.zeros(8, 8, dtype=dtype))
    except RuntimeError:
        return False
    return True
