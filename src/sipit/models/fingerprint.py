"""A fingerprint of a model's weights, so that states are not matched against another model's."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from sipit.models.quantized import scales

# Config entries that do not change what the model computes.
_IRRELEVANT = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
)


def fingerprint(model: nn.Module) -> str:
    """Return "sha256:" and 64 digits over the config and every byte of every weight as loaded.

    The same checkpoint loaded in another dtype has other weights, and another fingerprint.
    """
    config: Any = model.config
    settings = {k: v for k, v in config.to_dict().items() if k not in _IRRELEVANT}
    tensors = {**dict(model.named_parameters()), **_stored_buffers(model), **scales(model)}
    names = sorted(tensors)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(lambda name: _digest(tensors[name]), names))
    total = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, digest in zip(names, digests, strict=True):
        total.update(f"{name} {digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint holds, by name; `state_dict` is not asked, see `quantized.scales`."""
    found: dict[str, Tensor] = {}
    for name, value in model.named_buffers():
        owner, _, own = name.rpartition(".")
        if own not in model.get_submodule(owner)._non_persistent_buffers_set:
            found[name] = value
    return found


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    head = f"{values.dtype} {tuple(values.shape)}\n".encode()
    digest = hashlib.sha256(head)
    if values.numel():
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
