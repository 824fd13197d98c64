"""What was measured once of a model on this machine, kept in the cache directory for the next process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sipit.errors import StorageError
from sipit.storage import cache_dir, open_tensors, read_json, whole_file, write_json

if TYPE_CHECKING:
    from sipit.models.language_model import LanguageModel

_Kept = TypeVar("_Kept")

_MOST_BYTES = 1 << 28  # of the tensors of one file


@dataclass(frozen=True, kw_only=True)
class KeptFile:
    """A file of tensors that are kept of each model."""

    kind: str  # what they are: the name of their folder
    name: str  # of the file, dtype and ending left out
    version: int  # of their making, raised with it


def kept(
    lm: LanguageModel,
    kind: str,
    key: str,
    make: Callable[[], _Kept],
    *,
    to_json: Callable[[_Kept], Any],
    from_json: Callable[[Any], _Kept | None],
) -> _Kept:
    """Return what is kept of a model under a key, or make it and keep it.

    Kept apart for each device, arithmetic, number of threads, version of torch and kind of processor.

    Args:
        kind: what it is: the name of its folder, and the version of its making.
        from_json: from what the file holds; None where that cannot be such a value, and it is made anew.
    """
    path = cache_dir() / kind / f"{lm.fingerprint.removeprefix('sha256:')[:16]}.json"
    full = f"{key}; {_machine(lm)}"
    known: dict[str, Any] = {}
    with contextlib.suppress(StorageError, ValueError, RecursionError):
        read = read_json(path)
        if isinstance(read, dict) and read.get("format") == f"sipit.{kind}":
            known = read
    if full in known:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            found = from_json(known[full])
            if found is not None:
                return found
    made = make()
    with contextlib.suppress(StorageError, OSError):  # a cache that cannot be written costs the making each time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**known, "format": f"sipit.{kind}", full: to_json(made)})
    return made


def kept_tensors(
    lm: LanguageModel,
    file: KeptFile,
    make: Callable[[], _Kept],
    *,
    to_tensors: Callable[[_Kept], dict[str, Tensor]],
    from_tensors: Callable[[dict[str, Tensor]], _Kept | None],
) -> _Kept:
    """Return what is kept of a model in a file of tensors, or make it and keep it.

    Kept apart for each arithmetic; not at all where it is larger than a cache should hold. A file that is damaged, of
    another model or version, or holds values that are not finite is passed over.

    Args:
        file: which.
        from_tensors: from what the file holds, on the CPU; None where that cannot be such a thing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = cache_dir() / file.kind / lm.fingerprint.removeprefix("sha256:")[:16]
    path = folder / f"{file.name}-{lm.arithmetic}.safetensors"
    metadata = {"format": f"sipit.{file.kind}", "version": str(file.version), "fingerprint": lm.fingerprint}
    unusable = (SafetensorError, StorageError, OSError, KeyError, ValueError, RuntimeError)
    with contextlib.suppress(*unusable), open_tensors(path) as stream:
        if (stream.metadata() or {}) == metadata:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
            if all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                found = from_tensors(tensors)
                if found is not None:
                    return found
    made = make()
    tensors = {key: value.cpu().contiguous() for key, value in to_tensors(made).items()}
    if sum(tensor.nbytes for tensor in tensors.values()) <= _MOST_BYTES:
        with contextlib.suppress(StorageError, OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
    return made


def _machine(lm: LanguageModel) -> str:
    name = (
        torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    )
    return f"{lm.device.type} {name}, {lm.arithmetic}, {torch.get_num_threads()} threads, torch {torch.__version__}"
