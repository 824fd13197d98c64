"""Target caches as DeepSpec's writer lays them out."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def target_cache(
    folder: Path,
    samples: Sequence[tuple[Sequence[int], Tensor, Tensor]],
    layer_ids: Sequence[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    padding: int = 0,
    **changes: object,
) -> Path:
    """Write samples of (ids, (T, k, D) states, (T, D) last states), a shard each."""
    folder.mkdir(exist_ok=True)
    index = b""
    for number, (ids, states, last) in enumerate(samples):
        length = len(ids) + padding
        pad = torch.zeros(padding, *states.shape[1:])
        parts = [
            struct.pack(f"<{length}i", *ids, *[0] * padding),
            bytes([1] * len(ids) + [0] * padding),
            bytes(length),
            _raw(torch.cat([states, pad]).flatten(1), dtype),
            _raw(torch.cat([last, pad[:, 0]]), dtype),
        ]
        offsets = [sum(map(len, parts[:i])) for i in range(5)]
        (folder / f"shard-{number:05d}.bin").write_bytes(b"".join(parts))
        index += struct.pack("<QIIQQQQQ", number, number, length, *offsets)
    (folder / "samples.idx").write_bytes(index)
    manifest = {
        "version": 2,
        "num_samples": len(samples),
        "num_shards": len(samples),
        "target_layer_ids": list(layer_ids),
        "hidden_dtype": str(dtype).removeprefix("torch."),
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": 56,
        "hidden_size": int(samples[0][2].shape[1]),
        "target_model_name_or_path": "some/model",
        "shards": [{"shard_id": i, "file_name": f"shard-{i:05d}.bin"} for i in range(len(samples))],
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _raw(values: Tensor, dtype: torch.dtype) -> bytes:
    return values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
