"""What was measured once of a model on this machine, kept in the cache directory for the next process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sipit.errors import StorageError
from sipit.storage import cache_dir, open_tensors, read_json, whole_file, write_json

if TYPE_CHECKING:
    from sipit.models.language_model import LanguageModel

_Kept = TypeVar("_Kept")

_MOST_BYTES = 1 << 28  # of the tensors of one file


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

    Kept apart for each device, dtype, number of threads, version of torch and kind of processor.

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
    lm: LanguageModel, kind: str, name: str, make: Callable[[], dict[str, Tensor]], *, version: int
) -> dict[str, Tensor]:
    """Return named tensors that are kept of a model, on its device, or make and keep them.

    Kept apart for each dtype; not at all where they are larger than a cache should hold. A file that is damaged, of
    another model or version, or holds values that are not finite is passed over. The caller checks names and shapes.

    Args:
        kind: what they are: the name of their folder.
        name: of the file, its ending left out.
        version: of their making, raised with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = cache_dir() / kind / lm.fingerprint.removeprefix("sha256:")[:16]
    path = folder / f"{name}-{str(lm.dtype).removeprefix('torch.')}.safetensors"
    metadata = {"format": f"sipit.{kind}", "version": str(version), "fingerprint": lm.fingerprint}
    unusable = (SafetensorError, StorageError, OSError, ValueError, RuntimeError)
    with contextlib.suppress(*unusable), open_tensors(path) as stream:
        if (stream.metadata() or {}) == metadata:
            found = {key: stream.get_tensor(key).to(lm.device) for key in stream.keys()}  # noqa: SIM118
            if all(bool(tensor.isfinite().all()) for tensor in found.values()):
                return found
    made = make()
    if sum(tensor.nbytes for tensor in made.values()) <= _MOST_BYTES:
        with contextlib.suppress(StorageError, OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                save_file({key: value.cpu().contiguous() for key, value in made.items()}, temporary, metadata=metadata)
    return made


def _machine(lm: LanguageModel) -> str:
    name = (
        torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    )
    dtype = str(lm.dtype).removeprefix("torch.")
    return f"{lm.device.type} {name}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
