"""Files of torch.save, read with `weights_only=True` alone: draft-model training sets, tuples and caches.

Only zip files (torch 1.6 and later) are read, mapped into memory: the sizes an older file claims cannot be checked
before memory is taken for them. Members must be stored as they are, so that none is larger than the file.

Source: sgl-project/SpecForge, SafeAILab/EAGLE, NVIDIA/Model-Optimizer, vllm-project/speculators (until March 2026).
"""

from __future__ import annotations

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from sipit.errors import InputError
from sipit.observations.formats.dump import Dump, EachInTurn, Wanted, file_name, shortened
from sipit.observations.formats.rows import chosen_layers, chosen_prompts, refuse_unused, settled
from sipit.observations.formats.tensor_file import first_bytes, first_member
from sipit.observations.formats.tensors import (
    Maker,
    batch,
    cache_layers,
    generated_steps,
    hidden_states_tuple,
    joined,
    named,
)

_LARGEST_RATIO = 64  # of unpacked to packed bytes: states are noise and shrink by little
_RECIPES = (
    ("Cache", "tuple((layer.keys, layer.values) for layer in cache.layers)"),
    ("Output", "tuple(out.hidden_states)"),
    ("ActivationCache", "cache.cache_dict"),
    ("numpy", "torch.from_numpy(array)"),
)


class TorchFormat:
    """Dictionaries, lists and tuples of tensors."""

    name = "torch.save"

    def sniff(self, path: Path) -> bool:
        """Return whether a file is a torch archive, packed or not, or a pickle, which is refused with its way out."""
        head = first_bytes(path, 2)
        if head == b"\x1f\x8b":
            try:
                with gzip.open(path) as stream:
                    return stream.read(4)[:4] == b"PK\x03\x04"
            except (OSError, EOFError, zlib.error):
                return path.name.endswith((".ckpt.gz", ".pt.gz"))
        return (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05") or (first_member(path) or "").endswith(
            "data.pkl"
        )

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield the states of the object saved."""
        return EachInTurn(path, _makers(path, wanted))


def _makers(path: Path, wanted: Wanted) -> Iterator[Maker]:
    yield from _of_object(file_name(path), _loaded(path), wanted)


def _loaded(path: Path) -> Any:
    """Return the object saved, with no class and no code of its own."""
    name = file_name(path)
    packed = first_bytes(path, 2) == b"\x1f\x8b"
    source: Any = _unpacked(path) if packed else path
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        raise InputError(
            f"{name} is a cut-off file, a plain pickle or one of torch before 1.6, which sipit does not read; "
            "load it where you trust it and torch.save its tensors again"
        ) from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(f"{name} is a torch file with compressed members, which torch never writes; save it again")
    try:
        if packed:
            source.seek(0)
            return torch.load(source, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise InputError(_refusal(name, str(error))) from None


def _unpacked(path: Path) -> io.BytesIO:
    limit = _LARGEST_RATIO * path.stat().st_size + (1 << 16)
    try:
        with gzip.open(path) as stream:
            raw = stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file_name(path)} is not a whole gzip file; copy it again") from error
    if len(raw) > limit:
        raise InputError(f"{file_name(path)} unpacks to more than {_LARGEST_RATIO} times its size; unpack it yourself")
    return io.BytesIO(raw)


def _refusal(name: str, reason: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", reason) or re.search(r"([\w]+(?:\.[\w]+)+) was not an allowed", reason)
    kind = shortened(found[1] if found else "a class", 60)
    recipe = next((recipe for word, recipe in reversed(_RECIPES) if word in kind), "a dictionary or tuple of tensors")
    return f"{name} pickles {kind}, which sipit never loads because it runs code; torch.save {recipe} instead"


def _of_object(name: str, saved: Any, wanted: Wanted) -> Iterator[Maker]:
    if isinstance(saved, Tensor):
        refuse_unused(name, wanted, "key")
        yield from named(name, {"tensor": saved}, wanted)
    elif isinstance(saved, Mapping):
        yield from _of_dictionary(name, saved, wanted)
    elif isinstance(saved, list | tuple) and saved:
        yield from _of_sequence(name, saved, wanted, {})
    else:
        raise InputError(
            f"{name} holds {type(saved).__name__} without tensors; torch.save a tensor, a tuple or a dictionary"
        )


def _of_sequence(name: str, saved: Any, wanted: Wanted, beside: Mapping[Any, Any]) -> Iterator[Maker]:
    first = saved[0]
    if all(isinstance(entry, Mapping) for entry in saved):  # TensorRT-LLM: a list of prompts
        for number in chosen_prompts(len(saved), wanted, name):
            alone = Wanted(**{**vars(wanted), "prompt": None})
            yield from _safe_dictionary(f"{name}: prompt {number}", saved[number], alone)
    elif len(saved) in (2, 3) and all(isinstance(part, Tensor) and part.ndim == 4 for part in saved[:2]):
        yield from cache_layers(name, [saved], wanted)
    elif all(isinstance(entry, Tensor) for entry in saved):
        yield from hidden_states_tuple(name, saved, wanted, beside)
    elif isinstance(first, list | tuple) and first and isinstance(first[0], Tensor) and first[0].ndim == 3:
        if not all(isinstance(step, list | tuple) for step in saved):
            raise InputError(
                f"{name}: some of its {len(saved)} steps are no tuples; save generate()'s hidden_states whole"
            )
        yield from generated_steps(name, saved, wanted)
    elif any(isinstance(entry, list | tuple) for entry in saved):
        yield from cache_layers(name, saved, wanted)
    else:
        raise InputError(f"{name} is a list of {type(first).__name__}, expected tensors; save a tuple of tensors")


def _safe_dictionary(name: str, saved: Mapping[Any, Any], wanted: Wanted) -> Iterator[Maker]:
    try:
        yield from _of_dictionary(name, saved, wanted)
    except InputError as error:
        yield partial(_raise, error)


def _raise(error: InputError) -> Dump:
    raise error


def _of_dictionary(name: str, saved: Mapping[Any, Any], wanted: Wanted) -> Iterator[Maker]:
    """Yield the states of a dictionary by the keys its producer writes, else by the names in it."""
    states = saved.get("hidden_states")
    if wanted.key in (None, "hidden_states") and isinstance(states, list | tuple) and states:
        if "input_ids" in saved and all(isinstance(s, Tensor) and s.ndim == 2 for s in states):
            yield from _old_speculators(name, saved, states, wanted)
        else:
            yield from _of_sequence(name, states, replace(wanted, key=None), saved)
        return
    last = next((key for key in ("hidden_state", "hidden_states") if isinstance(saved.get(key), Tensor)), None)
    aux = next((key for key in ("aux_hidden_state", "aux_hidden_states") if saved.get(key) is not None), None)
    is_training_set = last is not None and "input_ids" in saved and (aux is not None or "loss_mask" in saved)
    if not is_training_set or wanted.key not in (None, last, aux):
        yield from named(name, saved, wanted)
        return
    assert last is not None
    width = saved[last].shape[-1] if saved[last].ndim else 0
    unsure = last == "hidden_states"  # Model-Optimizer: its scripts differ; EAGLE and SpecForge write the normed ones
    both = aux is not None
    if not both:
        refuse_unused(name, wanted, "layers")
    if (not both or wanted.key != aux) and not (both and wanted.key is None and _is_aux(wanted, unsure)):
        place = None if unsure else (None, "final")
        note = (
            "layer the last, before or after the final norm by version"
            if unsure
            else "layer the last, after the final norm"
        )
        beside = {"input_ids": saved["input_ids"]}
        alone = Wanted(
            **{**vars(wanted), "layers": None, "layer": wanted.layer if not both or wanted.key == last else None}
        )
        for make in batch(
            f"{name}: {last}" if both else name,
            saved[last],
            Wanted(prompt=wanted.prompt, dtype=wanted.dtype) if unsure else alone,
            place,
            beside,
            note,
        ):
            yield partial(_with_choices, make, alone) if unsure else make
    if aux is not None and wanted.key != last and wanted.site != "final":
        hint = "by default layers 2, N/2, N-3: say --layers"
        ids = {"input_ids": saved["input_ids"]}
        yield from joined(f"{name}: {aux}", saved[aux], width, wanted, beside=ids, hint=hint)


def _is_aux(wanted: Wanted, unsure: bool) -> bool:
    """Return whether the user's words name one of the joined layers, not the last states.

    Those have a layer of their own where they lie before the final norm, which may be `unsure`.
    """
    if unsure:
        return wanted.site == "block" and wanted.layers is not None and wanted.layer is not None
    return wanted.site == "block" or (wanted.layer is not None and wanted.site != "final")


def _with_choices(make: Any, wanted: Wanted) -> Dump:
    dump = make()
    return settled(replace(dump, site=None, choices=((None, "final"), (None, "block"))), wanted)


def _old_speculators(name: str, saved: Mapping[Any, Any], states: Any, wanted: Wanted) -> Iterator[Maker]:
    """Yield each of a list of (T, D) states; early versions normed the last one under the same keys."""
    beside = {"input_ids": saved["input_ids"]}
    if any(key.startswith("fp8") for key in saved if isinstance(key, str)):
        raise InputError(f"{name} is a float8 variant whose scales sipit does not know; ask for the run without float8")
    for number, layer in enumerate(chosen_layers(len(states), wanted, name)):
        if wanted.layer in (None, layer):
            is_last = number == len(states) - 1
            note = (
                f"layer not in the file, entry {number} of {len(states)}: a block's id, +1 (say --layers, blocks run)"
                if layer is None
                else f"layer {layer} (declared id {layer - 1}, +1), entry {number} of {len(states)}"
            )
            title = f"{name}: hidden_states[{number}]"
            for make in batch(
                title,
                states[number],
                Wanted(prompt=wanted.prompt) if is_last else wanted,
                (layer, "block"),
                beside,
                note,
            ):
                yield partial(_last_of_old, make, layer, wanted) if is_last else make


def _last_of_old(make: Any, layer: int | None, wanted: Wanted) -> Dump:
    dump = make()
    return settled(replace(dump, layer=None, site=None, choices=((layer, "block"), (layer, "final"))), wanted)
