"""Prompt caches of mlx-lm: safetensors with the keys and values of every block.

Tensors "i.0" and "i.1" are the keys and values of block i, (1, heads, room, width of a head); "i.2", where it is there,
is how many rows of the room are used; else these are the rows before a trailing run of zeros. Metadata names the class
of each cache under "1.i", older versions under "2.i". There are no ids. Rotating caches hold a window in ring order,
and quantised ones packed integers.

Source: mlx-lm's models/cache.py and cache_prompt.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipit.errors import InputError, OptionError, ShapeError
from sipit.observations.formats.dump import Dump, EachInTurn, Wanted, file_name
from sipit.observations.formats.rows import chosen_prompts, floats_of, name_of, refuse_unused, require_plain, settled
from sipit.observations.formats.tensor_file import safetensors_header
from sipit.storage import open_tensors

_TENSOR = re.compile(r"(\d{1,4})\.([01])")
_PLAIN = ("KVCache", "ConcatenateKVCache")


class MlxFormat:
    """A prompt cache of mlx-lm."""

    name = "mlx-lm prompt cache"

    def sniff(self, path: Path) -> bool:
        """Return whether a safetensors header names keys and values by block, and the class of each cache."""
        header = safetensors_header(path) or {}
        metadata = header.get("__metadata__")
        names = [name for name in header if name != "__metadata__"]
        return bool(names) and isinstance(metadata, dict) and bool(_kind(metadata, 0)) and "0.0" in names

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield the keys and values of each block."""
        return EachInTurn(path, _blocks(path, wanted))


def _blocks(path: Path, wanted: Wanted) -> Iterator[Callable[[], Dump]]:
    name = file_name(path)
    chosen_prompts(1, wanted, name)
    refuse_unused(name, wanted, "key", "layers")
    site = wanted.site or "kv"
    if site not in ("kv", "keys", "values"):
        raise OptionError(f"{name} holds keys and values alone; ask for --site kv, keys or values")
    with open_tensors(path) as stream:
        metadata = dict(stream.metadata() or {})
        held = {found[1] for key in stream.keys() if (found := _TENSOR.fullmatch(key))}  # noqa: SIM118
        if wanted.layer is not None and str(wanted.layer) not in held:
            last = max(map(int, held))
            raise OptionError(f"{name} holds the cache of blocks 0 to {last}, not {wanted.layer}; ask for another")
        for layer in sorted(map(int, held)):
            if wanted.layer in (None, layer):
                yield partial(_block, stream, layer, metadata, site=site, name=name, wanted=wanted)


def _block(stream: Any, layer: int, metadata: dict[str, str], *, site: str, name: str, wanted: Wanted) -> Dump:
    title = f"{name}: block {layer}"
    kind = _kind(metadata, layer) or "cache without a class"
    if kind not in _PLAIN:
        raise InputError(
            f"{title} is a {kind[:40]}: a rotating cache has lost the rows before its window, a quantised one packs "
            "its integers; make the cache without --max-kv-size and --kv-bits"
        )
    parts = []
    for number in (0, 1):
        stored = require_plain(stream.get_tensor(f"{layer}.{number}"), title)
        if stored.ndim != 4 or stored.shape[0] != 1:
            raise ShapeError(
                f"{title} has shape {tuple(stored.shape)}, expected (1, heads, tokens, width); save one prompt"
            )
        values, _ = floats_of(stored, title)
        parts.append(values[0].transpose(0, 1).flatten(1))  # (T, W)
    if len(parts[0]) != len(parts[1]):
        raise ShapeError(f"{title} holds {len(parts[0])} keys and {len(parts[1])} values; have mlx-lm write it again")
    both = torch.cat(parts, dim=1)
    n_rows = len(both)
    n_filled = _used(stream, layer, both, title)
    chosen = {"kv": both, "keys": parts[0], "values": parts[1]}[site][:n_filled]
    notes = [f"site {site} of block {layer}", f"dtype {name_of(chosen.dtype)}", f"rows {n_filled}"]
    if n_filled < n_rows:
        notes.append(f"padding: {n_rows - n_filled} rows of zeros at the end cut, room that was not used")
    return settled(Dump(name=title, values=chosen.contiguous(), layer=layer, site=site, notes=tuple(notes)), wanted)


def _kind(metadata: dict[str, Any], layer: int) -> str | None:
    """Return the class of a block's cache, where this version or an older one names it."""
    named = (metadata.get(f"{place}.{layer}") for place in (1, 2))
    return next((str(kind) for kind in named if str(kind).endswith("Cache")), None)


def _used(stream: Any, layer: int, rows: Tensor, title: str) -> int:
    """Return how many rows of the room (N, W) are used."""
    if f"{layer}.2" in stream.keys():  # noqa: SIM118 - not a dictionary
        offset = stream.get_tensor(f"{layer}.2")
        if offset.numel() != 1 or not 0 < int(offset) <= len(rows):
            raise InputError(
                f"{title} says that it uses another number of rows than it holds; have mlx-lm write it again"
            )
        return int(offset)
    filled = rows.any(dim=1).nonzero()[:, 0]
    return int(filled[-1]) + 1 if len(filled) else len(rows)
