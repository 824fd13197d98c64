"""Arrays of any name: .npy and .npz without pickles, and any safetensors file by its keys.

A bfloat16 array loses its type in numpy (`|V2`, or uint16): the user names it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError
from torch import Tensor

from sipit.errors import InputError
from sipit.observations.formats.dump import Dump, EachInTurn, Wanted, brief, file_name
from sipit.observations.formats.rows import refuse_unused
from sipit.observations.formats.tensor_file import first_bytes, first_member, looks_like_safetensors
from sipit.observations.formats.tensors import Maker, named
from sipit.storage import open_tensors

_LARGEST_RATIO = 64  # of unpacked to packed bytes: states are noise and shrink by little
_RAW = {1: np.uint8, 2: np.uint16}  # bytes an item → what holds them


class NumpyFormat:
    """One array (.npy)."""

    name = "numpy array"

    def sniff(self, path: Path) -> bool:
        """Return whether a file begins as numpy's arrays do."""
        return first_bytes(path, 6) == b"\x93NUMPY"

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield the prompts of the array, mapped into memory."""
        return EachInTurn(path, _of_array(path, wanted))


class NumpyArchiveFormat:
    """Named arrays (.npz)."""

    name = "numpy archive"

    def sniff(self, path: Path) -> bool:
        """Return whether the first member of a zip archive is an array."""
        return (first_member(path) or "").endswith(".npy")

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield the states under each name, one array in memory at a time."""
        return EachInTurn(path, _of_archive(path, wanted))


class SafetensorsFormat:
    """Named tensors in safetensors, of a tool sipit has no format for."""

    name = "safetensors"

    def sniff(self, path: Path) -> bool:
        """Return whether a file begins as safetensors files do."""
        return looks_like_safetensors(path)

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield the states under each name, one tensor at a time."""
        return EachInTurn(path, _of_safetensors(path, wanted))


class OnDemand(Mapping[Any, Any]):
    """Tensors by name, each read when it is asked for; one that cannot be read is the error that says why."""

    def __init__(self, names: list[str], load: Callable[[str], Tensor]) -> None:
        self._names = names
        self._load = load

    def __getitem__(self, name: object) -> Tensor | InputError:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._load(str(name))
        except InputError as error:
            return error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _of_array(path: Path, wanted: Wanted) -> Iterator[Maker]:
    name = file_name(path)
    refuse_unused(name, wanted, "key")
    with path.open("rb") as stream:
        shape, fortran, dtype = _require_size(stream, path.stat().st_size, name)
        start = stream.tell()
    array = np.memmap(path, dtype, "c", start, shape, "F" if fortran else "C")  # "c": torch wants writable memory
    yield from named(name, {"array": _tensor(array, name)}, wanted)


def _of_archive(path: Path, wanted: Wanted) -> Iterator[Maker]:
    name = file_name(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}

            def load(key: str) -> Tensor:
                member = members[key]
                if member.file_size > _LARGEST_RATIO * member.compress_size + (1 << 16):
                    raise InputError(
                        f"{name}: {key[:80]} unpacks to over {_LARGEST_RATIO} times its size; use np.savez"
                    )
                with archive.open(member) as stream:
                    shape, fortran, dtype = _require_size(stream, member.file_size, f"{name}: {key[:80]}")
                    flat = np.frombuffer(bytearray(stream.read()), dtype, count=int(np.prod(shape)))
                return _tensor(flat.reshape(shape, order="F" if fortran else "C"), f"{name}: {key[:80]}")

            yield from named(name, OnDemand(list(members), load), wanted)
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{name} is not a whole .npz file ({brief(error)}); copy it again") from error


def _of_safetensors(path: Path, wanted: Wanted) -> Iterator[Maker]:
    name = file_name(path)
    try:
        with open_tensors(path) as stream:
            yield from named(name, OnDemand(list(stream.keys()), stream.get_tensor), wanted)
    except SafetensorError as error:
        raise InputError(f"{name} is not a whole safetensors file ({brief(error)}); copy it again") from error


def _require_size(stream: Any, size: int, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and dtype of an array whose values lie behind its header in full.

    Raises:
        InputError: the header is not numpy's, asks for a pickle, or promises more than there is.
    """
    try:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = header(stream)
    except (ValueError, EOFError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise InputError(f"{name} has no header of a numpy array ({brief(error)}); save it again") from error
    if dtype.hasobject:
        raise InputError(f"{name} holds pickled objects, which sipit never loads; save one plain float array a prompt")
    count = 1
    for length in shape:
        count *= length
    if any(length < 0 for length in shape) or stream.tell() + count * dtype.itemsize > size:
        raise InputError(f"{name} is cut off: its header promises {str(shape)[:60]} values of {dtype}; copy it again")
    if not count:
        raise InputError(f"{name} has shape {str(shape)[:60]}: it holds no value; save a prompt that has tokens")
    return shape, fortran, dtype


def _tensor(array: np.ndarray[Any, Any], name: str) -> Tensor:
    dtype = array.dtype
    if dtype.names is None and dtype.kind == "V" and dtype.itemsize in _RAW:
        array = array.view(_RAW[dtype.itemsize])
    elif (dtype.kind, dtype.itemsize) not in {("f", 2), ("f", 4), ("f", 8), ("i", 2), ("u", 1), ("u", 2), ("i", 8)}:
        raise InputError(f"{name} has dtype {str(dtype)[:40]}, expected floats; save it again as float32")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.asarray(array))
