"""The headers of safetensors files and zip archives, read without their tensors."""

from __future__ import annotations

import struct
from pathlib import Path

from sipit.storage import parse_json

_MAX_HEADER = 100 << 20  # the library's own limit


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a regular file, none where there is no such file."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as stream:
            return stream.read(count)
    except (OSError, ValueError):
        return b""


def looks_like_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors files do: a length, then a JSON object."""
    head = first_bytes(path, 9)
    return len(head) == 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER


def safetensors_header(path: Path) -> dict[str, object] | None:
    """Return the header of a safetensors file, None where it is none."""
    if not looks_like_safetensors(path):
        return None
    (size,) = struct.unpack("<Q", first_bytes(path, 8))
    try:
        if size + 8 > path.stat().st_size:
            return None
        header = parse_json(first_bytes(path, 8 + size)[8:].decode("utf-8"))
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) else None


def safetensors_keys(path: Path) -> tuple[str, ...] | None:
    """Return the names of the tensors in a safetensors file, None where it is none."""
    header = safetensors_header(path)
    return None if header is None else tuple(key for key in header if key != "__metadata__")


def first_member(path: Path) -> str | None:
    """Return the name of the first member of a zip archive, whole or cut off; None where it is none."""
    head = first_bytes(path, 30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        return None
    (length,) = struct.unpack("<H", head[26:28])
    return first_bytes(path, 30 + length)[30:].decode("utf-8", "replace")
