"""What was measured once of a model on this machine, kept in the cache directory for the next process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sipit.errors import StorageError
from sipit.storage import cache_dir, read_json, write_json

if TYPE_CHECKING:
    from sipit.models.language_model import LanguageModel

_Kept = TypeVar("_Kept")


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


def _machine(lm: LanguageModel) -> str:
    name = (
        torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    )
    dtype = str(lm.dtype).removeprefix("torch.")
    return f"{lm.device.type} {name}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
