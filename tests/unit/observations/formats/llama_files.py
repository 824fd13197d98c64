"""Session and slot files as llama.cpp's sources lay them out."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


def memory(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    is_transposed: bool = False,
    cells: Sequence[int] | None = None,
    rotation: tuple[int, int] | None = None,
) -> bytes:
    """One cache of one stream: (T, W) keys and values of each block.

    `rotation` is how wide the rotations of keys and values are, which files since October 2026 say.
    """
    n_cells = len(keys[0])
    raw = struct.pack("<II", 1, n_cells)
    for position in range(n_cells) if cells is None else cells:
        raw += struct.pack("<iIi", position, 1, 0)
    raw += struct.pack("<II", int(is_transposed), len(keys))
    if rotation is not None:
        raw += struct.pack("<II", *rotation)
    for rows in keys:
        raw += struct.pack("<iQ", _TYPES[rows.dtype], rows.shape[1] * rows.element_size()) + _bytes(rows)
    for rows in values:
        if is_transposed:
            raw += struct.pack("<iII", _TYPES[rows.dtype], rows.element_size(), rows.shape[1]) + _bytes(rows.T)
        else:
            raw += struct.pack("<iQ", _TYPES[rows.dtype], rows.shape[1] * rows.element_size()) + _bytes(rows)
    return raw


def session(
    path: Path,
    ids: Sequence[int],
    memory_: bytes,
    *,
    architecture: str = "llama",
    has_outputs: bool = False,
    version: int = 10,
) -> Path:
    """A whole context; older versions of the format hold outputs before the memory."""
    raw = struct.pack("<III", 0x6767736E, 9 if has_outputs else version, len(ids)) + struct.pack(f"<{len(ids)}i", *ids)
    raw += struct.pack("<I", len(architecture)) + architecture.encode()
    if has_outputs:
        raw += struct.pack("<IiQ", 1, 0, 5) + bytes(20) + struct.pack("<Q", 0)
    path.write_bytes(raw + memory_)
    return path


def slot(path: Path, ids: Sequence[int], memory_: bytes, *, version: int = 3) -> Path:
    """One sequence, as llama-server saves it."""
    path.write_bytes(struct.pack("<III", 0x67677371, version, len(ids)) + struct.pack(f"<{len(ids)}i", *ids) + memory_)
    return path


def packed(ids: Sequence[int], *, n_media: int = 0, version: int = 1) -> list[int]:
    """Ids as llama-server packs them since August 2026; the places and contents of images and sounds left out."""
    return [-1, version, len(ids), *ids, n_media]


def neighbouring_pairs(keys: Tensor, d_head: int) -> Tensor:
    """Keys in the order that llama.cpp's converter gives heads of interleaved rotary embeddings. (T, W) → (T, W)."""
    return keys.view(len(keys), -1, 2, d_head // 2).transpose(2, 3).reshape(len(keys), -1)


def _bytes(rows: Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()
