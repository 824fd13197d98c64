"""Many observations: a folder of observation files, or one file that holds several."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from sipit.errors import InputError, SipitError, StorageError
from sipit.observations.file import positions_in, read_observation
from sipit.observations.observation import Observation
from sipit.storage import open_tensors, parse_json, require_file, whole_file

_FORMAT = "sipit.observations"
_VERSION = "1"
_DESCRIBED = ("site", "layer", "positions", "model", "fingerprint")
_MAY_BE_DESCRIBED = ("known_prefix", "is_last")


def write_observations(observations: Sequence[Observation], path: Path | str) -> None:
    """Write several observations into one file, whole or not at all.

    Raises:
        StorageError: the path cannot be written.
    """
    # Copies: the library refuses tensors that share memory, as two observations of one capture may.
    tensors = {
        f"states.{i:06d}": seen.states.detach().cpu().contiguous().clone() for i, seen in enumerate(observations)
    }
    tensors |= {
        f"half_step.{i:06d}": seen.half_step.detach().cpu().contiguous().clone()
        for i, seen in enumerate(observations)
        if seen.half_step is not None
    }
    described = [
        {key: getattr(seen, key) for key in (*_DESCRIBED, *(k for k in _MAY_BE_DESCRIBED if getattr(seen, k)))}
        for seen in observations
    ]
    metadata = {"format": _FORMAT, "version": _VERSION, "observations": json.dumps(described)}
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(28, str(error)) from error


def holds_many(path: Path | str) -> bool:
    """Return whether a path is a folder, or a file of several observations."""
    if os.path.isdir(path):  # noqa: PTH112 - no error on names that no file can have
        return True
    try:
        with open_tensors(path) as stream:
            return bool((stream.metadata() or {}).get("format") == _FORMAT)
    except (SafetensorError, OSError):
        return False


def read_observations(path: Path | str) -> Iterator[tuple[str, Observation]]:
    """Yield (name, observation) from a folder's .safetensors files by name, or from a file of several.

    Raises:
        StorageError, InputError: nothing there, or one of them cannot be read.
    """
    for name, seen in read_each(path):
        if isinstance(seen, SipitError):
            raise seen
        yield name, seen


def read_each(path: Path | str) -> Iterator[tuple[str, Observation | SipitError]]:
    """Yield (name, observation) as `read_observations`, and go on past files that cannot be read.

    Such a file is yielded as (name, the error that says why). Of a file of several, those before the
    first broken one are yielded, then the error under the file's own name.

    Raises:
        StorageError, InputError: the folder cannot be read or holds no such file.
    """
    if not os.path.isdir(path):  # noqa: PTH112 - no error on names that no file can have
        try:
            yield from _read_several(path)
        except SipitError as error:
            yield Path(path).name, error
        return
    try:
        files = sorted(file for file in Path(path).iterdir() if file.match("*.safetensors"))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}; check its permissions") from error
    if not files:
        raise InputError(f"{path} holds no .safetensors file; make observations with 'sipit capture'")
    for file in files:
        try:
            if holds_many(file):
                yield from ((f"{file.name}:{name}", seen) for name, seen in _read_several(file))
            else:
                yield file.name, read_observation(file)
        except SipitError as error:
            yield file.name, error


def _read_several(path: Path | str) -> Iterator[tuple[str, Observation]]:
    """Yield (name, observation) from a file of several."""
    require_file(path)
    try:
        with open_tensors(path) as stream:
            described: Any = parse_json((stream.metadata() or {}).get("observations", "[]"))
            names = set(stream.keys())
            keys = sorted(name for name in names if not name.startswith("half_step."))
            version = (stream.metadata() or {}).get("version")
            if version != _VERSION:
                raise InputError(
                    f"{path} has format version {version!r}, this sipit reads {_VERSION!r}; capture it again"
                )
            if not isinstance(described, list) or len(described) != len(keys) or not keys:
                raise InputError(f"{path} does not describe each of its {len(keys)} tensors; capture them again")
            for key, about in zip(keys, described, strict=True):
                if not isinstance(about, dict) or sorted(set(about) - set(_MAY_BE_DESCRIBED)) != sorted(_DESCRIBED):
                    raise InputError(f"{path}: the description of {key} is not what a capture writes; capture again")
                try:
                    about["positions"] = positions_in(about["positions"])
                    about["known_prefix"] = positions_in(about.get("known_prefix", []))
                    if not all(isinstance(about[key], str | None) for key in ("model", "fingerprint")):
                        raise TypeError("model and fingerprint are not text")
                    if about.get("is_last", True) is not True:
                        raise TypeError("is_last is neither true nor left out")
                    steps = key.replace("states.", "half_step.")
                    half_step = stream.get_tensor(steps) if steps in names and steps != key else None
                    yield key, Observation(states=stream.get_tensor(key), half_step=half_step, **about)
                except (SipitError, TypeError, ValueError) as error:
                    raise InputError(f"{path}: {key}: {error}") from error
    except (SafetensorError, ValueError) as error:
        if isinstance(error, SipitError):
            raise
        raise InputError(f"{path} is not a whole file of observations ({error}); copy or capture it again") from error
    except OSError as error:
        if isinstance(error, SipitError):
            raise
        raise StorageError(f"cannot read {path}: {error}; check its name and permissions") from error
