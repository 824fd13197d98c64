"""Keys and values in llama.cpp's session files and in its server's slot files.

Little-endian: magic, version, the number of tokens and their ids in clear; a session names its architecture, a
slot does not. llama-server of 2026 packs the ids of a slot: -1, a version, their number, the ids, the number of images
and sounds. Then, for each cache of the model (two where some blocks attend in a window): streams, cells with their
positions, and the keys of every block, then its values, a row a cell or transposed.

For architectures whose rotary embedding turns neighbouring pairs of coordinates, the converter of weights orders the
coordinates of each head so that they are neighbours; `Dump.is_interleaved` says so, and whoever knows the width of
a head can undo it.

Source: llama.cpp's src/llama-context.cpp, src/llama-kv-cache.cpp, src/llama-model.cpp (llama_model_rope_type);
tools/server's server_tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sipit.errors import InputError, OptionError
from sipit.observations.formats.dump import Dump, EachInTurn, Wanted, file_name
from sipit.observations.formats.rows import chosen_prompts, refuse_unused, settled
from sipit.observations.formats.tensor_file import first_bytes

_SESSION, _SLOT = 0x6767736E, 0x67677371
_SESSION_VERSIONS, _SLOT_VERSIONS = (9, 10, 11), (2, 3, 4)
_SAYS_ROTATION = {_SESSION: 11, _SLOT: 4}  # versions from which a cache says whether its rows are rotated
_PACKED, _PACKED_VERSION = -1, 1  # what llama-server of 2026 puts before the ids of a slot
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # ggml's number of each type
_MOST = 1 << 20  # layers, streams, cells or letters that a real file has fewer of
# Architectures whose keys transformers holds in another order: their rotary embedding turns neighbouring pairs.
_INTERLEAVED = ("llama", "mistral3", "granite", "granitemoe", "smollm3", "arcee", "olmo", "minicpm", "xverse", "deci")
_HALVES = (
    "qwen2",
    "qwen3",
    "qwen2moe",
    "qwen3moe",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gptneox",
    "stablelm",
    "falcon",
)


class LlamaCppFormat:
    """A session file or a slot file of llama.cpp."""

    name = "llama.cpp session or slot"

    def sniff(self, path: Path) -> bool:
        """Return whether a file begins with one of the two magics."""
        return first_bytes(path, 4) in (struct.pack("<I", _SESSION), struct.pack("<I", _SLOT))

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield the keys and values of each block."""
        return EachInTurn(path, _blocks(path, wanted))


@dataclass(frozen=True)
class _Cache:
    """One cache of a model, of one stream."""

    positions: tuple[int, ...]  # of each cell
    keys: list[Tensor]  # (cells, W) a block
    values: list[Tensor]


class _Reader:
    """Takes numbers off the front of a file, and refuses what it promises and lacks."""

    def __init__(self, raw: np.ndarray, name: str) -> None:
        self._raw = raw
        self._at = 0
        self.name = name

    @property
    def left(self) -> int:
        return len(self._raw) - self._at

    def take(self, n_bytes: int) -> np.ndarray:
        if n_bytes > self.left:
            raise InputError(
                f"{self.name} is cut off at byte {self._at}; copy it again or have llama.cpp save it again"
            )
        part = self._raw[self._at : self._at + n_bytes]
        self._at += n_bytes
        return part

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")).tobytes())[0])

    def count(self, what: str) -> int:
        found = self.number("I")
        if found > _MOST:
            raise InputError(f"{self.name} says it holds {found} {what}; it is not what llama.cpp saves")
        return found

    def mark(self) -> int:
        return self._at

    def back_to(self, at: int) -> None:
        self._at = at


def _blocks(path: Path, wanted: Wanted) -> Iterator[Callable[[], Dump]]:
    name = file_name(path)
    chosen_prompts(1, wanted, name)
    refuse_unused(name, wanted, "layers")
    reader = _Reader(np.memmap(path, np.uint8, "c"), name)
    magic, version = reader.number("I"), reader.number("I")
    if version not in (_SESSION_VERSIONS if magic == _SESSION else _SLOT_VERSIONS):
        raise InputError(f"{name} has version {version} of llama.cpp's format, which sipit does not know; save it anew")
    ids = _ids(tuple(int(i) for i in reader.take(4 * reader.count("tokens")).view("<i4")), name)
    architecture = None
    if magic == _SESSION:
        architecture = reader.take(reader.count("letters")).tobytes().decode("utf-8", "replace")
    says_rotation = version >= _SAYS_ROTATION[magic]
    caches = _caches(reader, may_have_outputs=magic == _SESSION, says_rotation=says_rotation)
    notes = (
        f"the {len(ids)} token ids lie in this file in clear: whoever has it needs no inversion",
        f"architecture {architecture or 'not named'}",
    )
    site = wanted.site or "kv"
    if site not in ("kv", "keys", "values"):
        raise OptionError(f"{name} holds keys and values alone; ask for --site kv, keys or values")
    n_blocks = len(caches[0].keys) if len(caches) == 1 else None
    if n_blocks is not None and wanted.layer is not None and wanted.layer >= n_blocks:
        raise OptionError(f"{name} holds the cache of blocks 0 to {n_blocks - 1}, not {wanted.layer}; ask for another")
    blocks = [(number, layer) for number, cache in enumerate(caches) for layer in range(len(cache.keys))]
    for number, layer in blocks:
        at = None if len(caches) > 1 else layer
        if len(caches) == 1 and wanted.layer not in (None, layer):
            continue
        title = f"{name}: block {layer}" if len(caches) == 1 else f"{name}: cache {number}, its block {layer}"
        if wanted.key is not None and wanted.key != title.removeprefix(f"{name}: "):
            continue
        yield partial(
            _dump, title, caches[number], layer,
            at=at, site=site, ids=ids, architecture=architecture, notes=notes, wanted=wanted,
        )  # fmt: skip


def _ids(held: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return the token ids, unpacked where llama-server packed them.

    Raises:
        InputError: they are packed in a way that is not known, or images or sounds stand among them.
    """
    if held[:1] != (_PACKED,):
        return held
    n_ids = held[2] if len(held) > 2 else -1
    if held[1:2] != (_PACKED_VERSION,) or not 0 <= n_ids < len(held) - 3:
        raise InputError(f"{name} packs its tokens in a way that sipit does not know; save it with another llama.cpp")
    if held[3 + n_ids]:
        raise InputError(
            f"{name} holds images or sounds among its tokens, which no token stands for; save a slot of text"
        )
    return held[3 : 3 + n_ids]


def _caches(reader: _Reader, *, may_have_outputs: bool, says_rotation: bool) -> list[_Cache]:
    """Return the caches that fill the rest of a file; older sessions hold outputs before them."""
    start = reader.mark()
    for skips in (False, True) if may_have_outputs else (False,):
        reader.back_to(start)
        try:
            if skips:
                reader.take(4 * reader.count("outputs"))
                for _ in ("logits", "embeddings"):
                    reader.take(4 * reader.number("Q"))
            found = []
            while reader.left:
                found += _streams(reader, says_rotation)
            return [cache for cache in found if cache.positions]
        except InputError as error:
            refused = error
    raise refused


def _streams(reader: _Reader, says_rotation: bool) -> list[_Cache]:
    found = []
    for _ in range(reader.count("streams")):
        n_cells = reader.count("cells")
        if n_cells:
            positions = []
            for _ in range(n_cells):
                positions.append(reader.number("i"))
                reader.take(4 * reader.count("sequences"))
            found.append(_stream(reader, tuple(positions), says_rotation))
    return found


def _stream(reader: _Reader, positions: tuple[int, ...], says_rotation: bool) -> _Cache:
    is_transposed, n_layers = reader.count("kinds of values"), reader.count("layers")
    if says_rotation and any([reader.count("rotated keys"), reader.count("rotated values")]):
        raise InputError(
            f"{reader.name} holds quantised rows, which llama.cpp rotated first; run it with --cache-type-k f16 "
            "--cache-type-v f16"
        )
    n_cells = len(positions)
    keys = [_rows(reader, n_cells) for _ in range(n_layers)]
    if not is_transposed:
        return _Cache(positions, keys, [_rows(reader, n_cells) for _ in range(n_layers)])
    values = []
    for _ in range(n_layers):
        kind, size, width = reader.number("i"), reader.count("bytes"), reader.count("columns")
        values.append(_floats(reader.take(size * width * n_cells), kind, reader.name).view(width, n_cells).T)
    return _Cache(positions, keys, values)


def _rows(reader: _Reader, n_cells: int) -> Tensor:
    kind, row_bytes = reader.number("i"), reader.number("Q")
    return _floats(reader.take(row_bytes * n_cells), kind, reader.name).view(n_cells, -1)


def _floats(raw: np.ndarray, kind: int, name: str) -> Tensor:
    if kind not in _FLOATS:
        raise InputError(
            f"{name} is quantised (ggml type {kind}), and its rows may have been rotated, which no file says; run "
            "llama.cpp with --cache-type-k f16 --cache-type-v f16"
        )
    return torch.from_numpy(raw.copy()).view(_FLOATS[kind])


def _dump(
    title: str,
    cache: _Cache,
    layer: int,
    *,
    at: int | None,
    site: str,
    ids: tuple[int, ...],
    architecture: str | None,
    notes: tuple[str, ...],
    wanted: Wanted,
) -> Dump:
    order = sorted(range(len(cache.positions)), key=cache.positions.__getitem__)
    positions = [cache.positions[i] for i in order]
    first = positions[0]
    if positions != list(range(first, first + len(positions))):
        raise InputError(f"{title} holds other cells than one run of positions; save the slot of one sequence alone")
    keys, values = cache.keys[layer][order], cache.values[layer][order]
    if site != "values" and architecture not in (*_INTERLEAVED, *_HALVES):
        raise InputError(
            f"{title}: how keys of this architecture ({architecture or 'not named'}) are ordered is not known; "
            "ask for --site values"
        )
    held = {"keys": keys, "values": values, "kv": torch.cat([keys, values], dim=1)}[site]
    own = ids[first : first + len(positions)] if len(ids) >= first + len(positions) else None
    more = () if first == 0 else (f"rows from position {first} on: a window dropped those before",)
    return settled(
        Dump(
            name=title,
            values=held,
            layer=at,
            site=site,
            input_ids=own,
            positions_from=first or None,
            is_interleaved=site != "values" and architecture in _INTERLEAVED,
            notes=(*notes, f"site {site} of block {layer}", f"dtype {keys.dtype}".replace("torch.", ""), *more),
        ),
        wanted,
    )
