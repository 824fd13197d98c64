"""Target caches of DeepSpec: a folder of a manifest, an index and raw shards.

manifest.json names the model and the layers; an id counts the blocks before its block's output less one, so layer is id
+ 1 and id -1 is the input of block 0. samples.idx holds a record of 56 bytes a sample; its shard holds ids (int32),
attention mask and loss mask (uint8), the states of all layers side by side (T, k * D), and the last ones (T, D),
which lie behind the final norm. Values are bfloat16, or float8 without a scale.

Source: DeepSpec's deepspec/data/target_cache_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sipit.errors import InputError, OptionError
from sipit.observations.formats.dump import Dump, EachInTurn, Place, Wanted, brief, file_name, shortened
from sipit.observations.formats.rows import (
    chosen_prompts,
    floats_of,
    ids_of,
    is_wanted,
    refuse_unused,
    settled,
    without_padding,
)
from sipit.storage import read_json

_RECORD = struct.Struct("<QIIQQQQQ")  # sample, shard, length; offsets of ids, two masks, states, last states
_VERSION = 2
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
_MOST_LAYERS = 10_000


class DeepSpecFormat:
    """A target cache, finished."""

    name = "DeepSpec target cache"

    def sniff(self, path: Path) -> bool:
        """Return whether a folder holds a manifest and an index."""
        try:
            return (path / "manifest.json").is_file() and (path / "samples.idx").is_file()
        except OSError:
            return False

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield the states of each sample at each layer."""
        return EachInTurn(path, _samples(path, wanted))


@dataclass(frozen=True)
class _Manifest:
    layers: tuple[int, ...]  # blocks run, of the joined columns
    width: int
    dtype: torch.dtype
    shards: tuple[Path, ...]
    model: str


def _samples(path: Path, wanted: Wanted) -> Iterator[Callable[[], Dump]]:
    name = file_name(path)
    refuse_unused(name, wanted, "key", "layers")
    manifest = _manifest(path, name)
    index = np.memmap(path / "samples.idx", np.uint8, "r") if (path / "samples.idx").stat().st_size else b""
    if not len(index) or len(index) % _RECORD.size:
        raise InputError(f"{name}: samples.idx is not records of {_RECORD.size} bytes; copy the folder again")
    places: list[Place] = [*((layer, "block") for layer in manifest.layers), (None, "final")]
    chosen = [number for number, place in enumerate(places) if _is_asked_for(place, wanted)]
    if not chosen:
        held = ", ".join(map(str, manifest.layers))
        raise OptionError(f"{name} holds layers {held} and site final; ask for one of them")
    for number in chosen_prompts(len(index) // _RECORD.size, wanted, name):
        record = _RECORD.unpack(bytes(index[number * _RECORD.size : (number + 1) * _RECORD.size]))
        for column in chosen:
            yield partial(
                _dump, name, number, record, manifest=manifest, column=column, place=places[column], wanted=wanted
            )


def _is_asked_for(place: Place, wanted: Wanted) -> bool:
    if wanted.layer is not None and place[0] is None:
        return wanted.site == "final"
    return is_wanted(place, wanted)


def _manifest(path: Path, name: str) -> _Manifest:
    try:
        read: Any = read_json(path / "manifest.json")
        if read["version"] != _VERSION:
            raise InputError(
                f"{name} has version {str(read['version'])[:20]} of DeepSpec's cache, sipit reads {_VERSION}"
            )
        layers = tuple(int(i) + 1 for i in read["target_layer_ids"])
        shards = tuple(path / Path(str(shard["file_name"])).name for shard in read["shards"])
        width, dtype = int(read["hidden_size"]), _DTYPES[read["hidden_dtype"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: manifest.json is not DeepSpec's ({brief(error)}); copy the folder again") from error
    if width < 1 or not layers or not all(0 <= layer < _MOST_LAYERS for layer in layers):
        raise InputError(f"{name}: manifest.json names no layers or no width; copy the folder again")
    return _Manifest(layers, width, dtype, shards, str(read.get("target_model_name_or_path", "not named")))


def _dump(
    name: str, number: int, record: tuple[int, ...], *, manifest: _Manifest, column: int, place: Place, wanted: Wanted
) -> Dump:
    title = f"{name}: prompt {number}, {'site final' if place[0] is None else f'layer {place[0]}'}"
    _, shard, length, ids_at, mask_at, _, states_at, last_at = record
    if shard >= len(manifest.shards):
        raise InputError(f"{title} lies in shard {shard} of {len(manifest.shards)}; copy the folder again")
    raw = np.memmap(manifest.shards[shard], np.uint8, "r")
    k, width, dtype = len(manifest.layers), manifest.width, manifest.dtype
    ids = ids_of(_taken(raw, ids_at, 4 * length, title).view(torch.int32), f"{title}: ids")
    mask = _taken(raw, mask_at, length, title)
    if place[0] is None:
        stored = _taken(raw, last_at, length * width * dtype.itemsize, title).view(dtype).view(length, width)
    else:
        joined = _taken(raw, states_at, length * k * width * dtype.itemsize, title).view(dtype)
        stored = joined.view(length, k, width)[:, column]
    kept, padding = without_padding(mask, f"{title}: attention mask")
    values, rounded = floats_of(stored[kept].contiguous(), title)
    declared = "what DeepSpec calls last" if place[0] is None else f"declared {place[0] - 1}, +1"
    notes: tuple[str, ...] = (f"layer {place[0]} ({declared})" if place[0] is not None else f"site final ({declared})",)
    notes += (
        f"model {shortened(manifest.model)}, as the manifest says",
        f"rows {len(values)}",
        *([padding] if padding else []),
    )
    return settled(
        Dump(
            name=title,
            values=values,
            layer=place[0],
            site=place[1],
            input_ids=ids[kept],
            rounded=rounded,
            notes=notes,
        ),
        wanted,
    )


def _taken(raw: np.ndarray, start: int, size: int, title: str) -> Tensor:
    if not size or start + size > len(raw):
        raise InputError(f"{title} reaches beyond the end of its shard; copy the folder again")
    return torch.from_numpy(np.array(raw[start : start + size]))
