"""Files that other tools wrote, read as the rows of one prompt at one place.

Imports no model: what a file leaves open is decided by the user, or by trying the rows against models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from sipit.errors import InputError, OptionError, SipitError, StorageError
from sipit.observations.formats.arrays import NumpyArchiveFormat, NumpyFormat, SafetensorsFormat
from sipit.observations.formats.deepspec import DeepSpecFormat
from sipit.observations.formats.dump import Dump, ModelShape, Wanted, brief, file_name
from sipit.observations.formats.json_states import JsonFormat
from sipit.observations.formats.llama_cpp import LlamaCppFormat
from sipit.observations.formats.mlx import MlxFormat
from sipit.observations.formats.observed import in_halves, observation_of, observed, settled_dumps, unpadded
from sipit.observations.formats.sae_lens import SaeLensFormat
from sipit.observations.formats.torch_files import TorchFormat
from sipit.observations.formats.vllm import VllmFormat
from sipit.storage import open_tensors, require_file

__all__ = [
    "FORMATS",
    "Dump",
    "ModelShape",
    "ObservationFormat",
    "Wanted",
    "in_halves",
    "is_foreign",
    "observation_of",
    "observed",
    "read_dumps",
    "settled_dumps",
    "unpadded",
]

# Endings of files that hold values. Others in a folder (locks, settings, logs) are passed over unless a format knows
# them by content.
_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".gz", ".npy", ".npz", ".bin", ".session", ".arrow")
_DEPTH = 8  # of folders in folders


class ObservationFormat(Protocol):
    """How the files of one producer are recognised and read."""

    name: str

    def sniff(self, path: Path) -> bool:
        """Return whether a path holds this format, by its content; cheap, and never raises."""
        ...

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield what the path holds, lazily; one bad item raises for itself, and the next call goes on."""
        ...


FORMATS: tuple[ObservationFormat, ...] = (
    DeepSpecFormat(),
    SaeLensFormat(),
    VllmFormat(),
    MlxFormat(),
    TorchFormat(),
    LlamaCppFormat(),
    JsonFormat(),
    NumpyFormat(),
    NumpyArchiveFormat(),
    SafetensorsFormat(),
)


def read_dumps(path: Path, wanted: Wanted) -> Iterator[Dump | SipitError]:
    """Yield what a file or a folder of another tool holds, by name; what cannot be read as the error that says why."""
    if not path.is_dir() or _format_of(path) is not None:
        yield from _of_file(path, wanted)
        return
    empty = True
    for item in _of_folder(path, path, wanted, _DEPTH):
        empty = False
        yield item
    if empty:
        yield InputError(f"{file_name(path)} holds no file that sipit can read; see docs for the tools it knows")


def is_foreign(path: Path) -> bool:
    """Return whether a path holds what another tool wrote: a known format, or a folder of files without one of ours."""
    if _is_own(path):
        return False
    if _format_of(path) is not None:
        return True
    try:
        files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    except OSError:
        return False
    return not any(_is_own(file) for file in files) and any(_format_of(file) is not None for file in files)


def _is_own(path: Path) -> bool:
    try:
        with open_tensors(path) as stream:
            return str((stream.metadata() or {}).get("format")).startswith("sipit.")
    except (SafetensorError, OSError):
        return False


def _format_of(path: Path) -> ObservationFormat | None:
    return next((each for each in FORMATS if each.sniff(path)), None)


def _of_file(path: Path, wanted: Wanted) -> Iterator[Dump | SipitError]:
    found = _format_of(path)
    if found is None:
        try:
            require_file(path)
        except SipitError as error:
            yield error
            return
        yield InputError(
            f"{file_name(path)} is no file that sipit knows: its content is of none of the tools it reads; "
            "save the states as safetensors, .npy or a torch tensor"
        )
        return
    dumps, is_empty = found.read(path, wanted), True
    while True:
        try:
            yield next(dumps)
        except StopIteration:
            break
        except SipitError as error:
            yield error
        is_empty = False
    if is_empty:
        yield OptionError(
            f"{file_name(path)} holds nothing at the place that --layer, --site or --key names; ask for another"
        )


def _of_folder(folder: Path, top: Path, wanted: Wanted, depth: int) -> Iterator[Dump | SipitError]:
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        yield StorageError(f"cannot read {file_name(folder)}: {brief(error)}; check its permissions")
        return
    for path in paths:
        if path.is_dir() and _format_of(path) is None:
            if depth and not path.is_symlink():
                yield from _of_folder(path, top, wanted, depth - 1)
        elif path.is_dir() or path.suffix.lower() in _ENDINGS or _format_of(path) is not None:
            for item in _of_file(path, wanted):
                yield _named_below(item, path, top) if isinstance(item, Dump) else item


def _named_below(dump: Dump, path: Path, top: Path) -> Dump:
    """Return a dump called by its file's path below the folder that was named."""
    below = path.relative_to(top).parent
    return dump if below == Path() else replace(dump, name=f"{below.as_posix()}/{dump.name}")
