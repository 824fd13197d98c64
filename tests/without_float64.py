"""A stand-in for a device that has no float64 and does not mix with the CPU's tensors: an Apple GPU (mps).

Its tensors say that they are there and hold what the CPU computed. As on the device itself, float64 is an error, and so
is an operation on its tensors and the CPU's, but for indices and single numbers. Nothing of its kernels is imitated.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sipit import LanguageModel, float64
from tests.tiny_models import tiny_model


class _Backend:
    """What torch asks the module of a device for."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def get_rng_state(_: Any) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def set_rng_state(*_: Any) -> None:
        pass

    @staticmethod
    def manual_seed_all(_: int) -> None:
        pass


_setup_privateuseone_for_python_backend("sipit_device", _Backend)
DEVICE = torch.device("sipit_device", 0)
_INDEXING = (
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "copy_",
    "_unsafe_index",
)  # takes the CPU's indices


class OnDevice(Tensor):
    """A tensor that says it is on the device; `held` is what it holds, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        """Wrap a tensor of the CPU."""
        if held.dtype == torch.float64:
            raise TypeError("the device has no float64")
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply vectors as rows: torch makes its own row a vector again in place, which no wrapper sees."""
        if func in (Tensor.matmul, Tensor.__matmul__, torch.matmul) and args[0].ndim == 1:
            return (args[0][None] @ args[1])[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def tolist(self) -> Any:
        """Return what it holds as Python numbers."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute on the CPU, and wrap what comes out unless it was asked for elsewhere."""
        return _computed(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    """Sees operations that no tensor of the device takes part in: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [leaf for leaf in given if isinstance(leaf, OnDevice)]
    asked = kwargs.get("device")
    name = func._schema.name.split("::")[1]
    if ours and asked is None and name not in _INDEXING:
        others = [leaf for leaf in given if not isinstance(leaf, OnDevice) and leaf.ndim > 0]
        if others:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    is_here = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
    if name == "copy_":
        is_here = isinstance(args[0], OnDevice)
    found = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    known = {id(leaf.held): leaf for leaf in ours}

    def wrapped(value: Any) -> Any:
        if not (is_here and isinstance(value, Tensor)):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)

    return tree_map(wrapped, found)


def _unwrapped(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """Let tensors be moved to the device while the body runs."""
    with (
        patch.object(float64, "_WITHOUT", (DEVICE.type,)),
        torch.no_grad(),
        _Device(),
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) by way of the CPU
        try:
            yield DEVICE
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def moved(model: nn.Module) -> nn.Module:
    """Return a model with its weights and buffers on the device; inside `device_without_float64` alone."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(OnDevice(value.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return model


def main() -> None:
    """Print what a model answers on the device otherwise than it must."""
    from tests.oracle.test_without_float64 import wrong_answers

    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, {"SIPIT_CACHE": folder}),
        device_without_float64(),
    ):
        model = moved(tiny_model("llama", attn_implementation="eager", num_hidden_layers=2, vocab_size=64))
        print(json.dumps(wrong_answers(LanguageModel(model, name="on the device"))))
