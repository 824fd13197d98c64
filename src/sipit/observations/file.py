"""The observation file: one safetensors file a prompt. Its specification is docs/observation-file.md."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sipit.errors import InputError, SipitError, StorageError
from sipit.observations.cut import SITES
from sipit.observations.observation import Observation
from sipit.storage import open_tensors, parse_json, require_file, whole_file

_FORMAT = "sipit.observation"
_VERSION = "1"
_REQUIRED = ("format", "version", "site", "layer", "positions")
_OPTIONAL = ("model", "fingerprint", "known_prefix", "is_last")


def write_observation(seen: Observation, path: Path | str) -> None:
    """Write an observation file, whole or not at all.

    Raises:
        StorageError: the path cannot be written.
    """
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "site": seen.site,
        "layer": str(seen.layer),
        "positions": json.dumps(seen.positions),
    }
    if seen.model is not None:
        metadata["model"] = seen.model
    if seen.fingerprint is not None:
        metadata["fingerprint"] = seen.fingerprint
    if seen.known_prefix:
        metadata["known_prefix"] = json.dumps(seen.known_prefix)
    if seen.is_last:
        metadata["is_last"] = "true"
    tensors = {"states": seen.states.detach().cpu().contiguous()}
    if seen.half_step is not None:
        tensors["half_step"] = seen.half_step.detach().cpu().contiguous()
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # the library reports a full disk in its own class
            raise OSError(28, str(error)) from error


def read_observation(path: Path | str) -> Observation:
    """Read an observation file and check its size, keys, types and values.

    Raises:
        StorageError: the file is missing or unreadable.
        InputError: it is truncated, is not an observation, or a value is out of range.
    """
    require_file(path)
    try:
        with open_tensors(path) as stream:
            metadata = dict(stream.metadata() or {})
            keys = list(stream.keys())
            if sorted(keys) not in (["states"], ["half_step", "states"]) or metadata.get("format") != _FORMAT:
                raise InputError(
                    f"{path} is not an observation file: it holds {_named(keys)} and the format "
                    f"{str(metadata.get('format'))[:40]!r}, expected ['states'] and {_FORMAT!r}; make one with "
                    "'sipit capture'"
                )
            states = stream.get_tensor("states")
            half_step = stream.get_tensor("half_step") if "half_step" in keys else None
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy or capture it again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}; check its permissions") from error
    return _observation(path, metadata, states, half_step)


def _observation(path: Path | str, metadata: dict[str, str], states: Tensor, half_step: Tensor | None) -> Observation:
    absent = [key for key in _REQUIRED if key not in metadata]
    unknown = sorted(set(metadata) - set(_REQUIRED) - set(_OPTIONAL))
    if absent or unknown:
        named = [key[:40] for key in unknown[:3]]
        raise InputError(f"{path}: metadata keys missing {absent}, unknown {named}; see docs/observation-file.md")
    if metadata["version"] != _VERSION:
        raise InputError(
            f"{path} has format version {metadata['version'][:40]!r}, this sipit reads {_VERSION!r}; "
            "capture it again or use the sipit that wrote it"
        )
    try:
        layer = whole_number(metadata["layer"])
        positions = positions_in(parse_json(metadata["positions"]))
        prefix = positions_in(parse_json(metadata.get("known_prefix", "[]")))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path}: layer must be a whole number, positions and known_prefix lists of them; got "
            f"{metadata['layer'][:40]!r} and {metadata['positions'][:40]!r}; capture it again"
        ) from error
    if metadata.get("is_last", "true") != "true":
        raise InputError(f"{path}: is_last is {metadata['is_last'][:40]!r}, expected 'true' or no such key")
    if metadata["site"] not in SITES:
        raise InputError(f"{path}: site {metadata['site'][:40]!r} is unknown; expected one of {', '.join(SITES)}")
    try:
        return Observation(
            states=states,
            layer=layer,
            site=metadata["site"],
            positions=positions,
            known_prefix=prefix,
            model=metadata.get("model"),
            fingerprint=metadata.get("fingerprint"),
            half_step=half_step,
            is_last="is_last" in metadata,
        )
    except SipitError as error:
        raise type(error)(f"{path}: {error}") from error


def _named(keys: list[str]) -> str:
    shown = ", ".join(ascii(key[:40]) for key in keys[:3])
    return f"the tensors {shown}{', …' if len(keys) > 3 else ''}" if keys else "no tensors"


def whole_number(text: str) -> int:
    """Return the number that decimal digits name."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def positions_in(listed: object) -> tuple[int, ...]:
    """Return the positions that a list of whole numbers names."""
    if not isinstance(listed, list) or not all(type(p) is int for p in listed):
        raise ValueError("positions are not a list of whole numbers")
    return tuple(listed)
