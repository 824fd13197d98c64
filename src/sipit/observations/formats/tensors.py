"""Tensors that lie under names, in lists and in tuples, read by what their names and shapes mean.

Whoever stores them (a torch file, .npz, safetensors), the same rules hold: entry i of a tuple of hidden states is
`layer` i and its last entry is after the final norm; a cache's layer i depends on the input of block i.

Source: transformers' output_capturing.py and cache_utils.py; TransformerLens' ActivationCache.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sipit.errors import InputError, OptionError, ShapeError
from sipit.observations.formats.dump import Dump, Place, Wanted
from sipit.observations.formats.rows import (
    chosen_layers,
    chosen_prompts,
    ids_of,
    is_wanted,
    one_prompt,
    refuse_unused,
    require_plain,
    require_same_length,
    split_width,
    without_padding,
)
from sipit.observations.formats.top_logits import of_tensors, pair_in

Maker = Callable[[], Dump]
_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")
_MASK, _IDS = "attention_mask", ("input_ids", "token_ids")


def place_of_hook(name: str) -> Place | None:
    """Return the place that a TransformerLens hook names, None where it is no place of ours."""
    found = _HOOK.fullmatch(name)
    if found:
        return int(found[1]) + (found[2] == "post"), "block"
    return None


def batch(
    name: str, stored: object, wanted: Wanted, place: Place | None, beside: Mapping[Any, Any], *notes: str
) -> Iterator[Maker]:
    """Yield the dump of each prompt of (B, T, W) or (T, W) values.

    Args:
        beside: what lies in the same file; ids and a mask are taken from it.
    """
    tensor = require_plain(stored, name)
    if tensor.ndim == 1 and tensor.numel():
        raise ShapeError(
            f"{name} is one vector of {tensor.shape[0]} numbers, perhaps pooled: save a row for each token instead, "
            "shape (tokens, width)"
        )
    if tensor.ndim not in (2, 3):
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, expected (batch, tokens, width) or (tokens, width)")
    prompts = tensor if tensor.ndim == 3 else tensor[None]
    for number in chosen_prompts(len(prompts), wanted, name):
        yield partial(_of_batch, name, prompts, number, wanted=wanted, place=place, beside=beside, notes=notes)


def _of_batch(
    name: str,
    prompts: Tensor,
    number: int,
    *,
    wanted: Wanted,
    place: Place | None,
    beside: Mapping[Any, Any],
    notes: tuple[str, ...],
) -> Dump:
    title = name if len(prompts) == 1 else f"{name}: prompt {number}"
    rows = prompts[number]
    ids, mask = _ids_and_mask(beside, number, len(prompts), title)
    for what, row in (("token ids", ids), ("attention mask", mask)):
        if row is not None and row.shape[0] != rows.shape[0]:
            require_same_length(rows.shape[0], range(row.shape[0]), f"{title} ({what})")
    if mask is not None:
        kept, note = without_padding(mask, f"{title}: {_MASK}")
        rows, ids = rows[kept], None if ids is None else ids[kept]
        notes = (*notes, *([note] if note else []))
    elif len(prompts) > 1:
        notes = (*notes, "padding: left in, no mask in the file")
    known = None if ids is None else ids_of(ids, f"{title}: ids")
    return one_prompt(title, rows, wanted, place, input_ids=known, notes=notes)


def _row_of(stored: object, number: int, count: int, name: str) -> Tensor:
    if isinstance(stored, list | tuple):
        stored = torch.tensor(ids_of(stored, name), dtype=torch.int64)
    tensor = require_plain(stored, name)
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or tensor.shape[0] != count:
        raise InputError(
            f"{name}: ids or mask of shape {tuple(tensor.shape)} beside {count} prompts do not belong together; "
            "save them as (batch, tokens)"
        )
    return tensor[number]


def hidden_states_tuple(
    name: str, entries: Sequence[object], wanted: Wanted, beside: Mapping[Any, Any]
) -> Iterator[Maker]:
    """Yield the states of a tuple of hidden states: entry i is layer i, the last after the final norm."""
    refuse_unused(name, wanted, "key", "layers")
    last = len(entries) - 1
    places: list[Place] = [(i, "block" if i < last else "final") for i in range(len(entries))]
    chosen = [i for i, place in enumerate(places) if is_wanted(place, wanted)]
    if not chosen:
        raise OptionError(
            f"{name} holds layers 0 to {last - 1} before the final norm and entry {last} after it, "
            "not the layer and site asked for; ask for one of those"
        )
    for i in chosen:
        note = f"layer {i} (entry {i} of {last + 1}, +0){', after the final norm' if i == last else ''}"
        title = f"{name}: hidden_states[{i}]"
        yield from _safely(partial(batch, title, entries[i], wanted, places[i], beside, note))


def generated_steps(name: str, steps: Sequence[Sequence[object]], wanted: Wanted) -> Iterator[Maker]:
    """Yield the states of `generate()`: a tuple for each step of a tuple for each layer, joined along the tokens."""
    if len({len(step) for step in steps}) != 1:
        raise InputError(f"{name}: its steps hold different numbers of layers; save generate()'s hidden_states whole")
    joined = []
    for layer in range(len(steps[0])):
        parts = [require_plain(step[layer], f"{name}: step {i}") for i, step in enumerate(steps)]
        if any(p.ndim != 3 or (p.shape[0], p.shape[2]) != (parts[0].shape[0], parts[0].shape[2]) for p in parts):
            raise ShapeError(f"{name}: states of layer {layer} differ in shape between steps; save them whole")
        joined.append(torch.cat(parts, 1))
    for make in hidden_states_tuple(name, joined, wanted, {}):
        yield partial(_noted, make, f"steps: {len(steps)} of generate() joined")


def _noted(make: Maker, note: str) -> Dump:
    dump = make()
    return replace(dump, notes=(*dump.notes, note))


def cache_layers(name: str, layers: Sequence[object], wanted: Wanted) -> Iterator[Maker]:
    """Yield the keys and values of each layer of a cache: tuples of (keys, values), a third entry left out.

    A layer that holds fewer positions than the longest holds the last ones: its window has slid.
    """
    refuse_unused(name, wanted, "key", "layers")
    pairs = [_pair(layer, f"{name}: layer {i}") for i, layer in enumerate(layers)]
    longest = max((pair[0].shape[2] for pair in pairs if not isinstance(pair, InputError)), default=0)
    chosen = [i for i in range(len(pairs)) if wanted.layer in (None, i)] if len(pairs) > 1 else [0]
    if not chosen:
        raise OptionError(
            f"{name} holds the cache of blocks 0 to {len(pairs) - 1}, not {wanted.layer}; ask for another"
        )
    for i in chosen:
        known = i if len(pairs) > 1 else None
        pair = pairs[i]
        if isinstance(pair, InputError):
            yield partial(_raise, pair)
            continue
        title = name if known is None else f"{name}: layer {i}"
        note = "layer not in the file: one pair alone" if known is None else f"layer {i} (cache of block {i}, +0)"
        keys, values = pair
        for number in chosen_prompts(keys.shape[0], wanted, title):
            full = title if keys.shape[0] == 1 else f"{title}, prompt {number}"
            yield partial(
                cached, full, keys[number], values[number], layer=known, longest=longest, wanted=wanted, note=note
            )


def cached(
    name: str, keys: Tensor, values: Tensor, *, layer: int | None, longest: int, wanted: Wanted, note: str
) -> Dump:
    """Return the dump of keys and values (H, T, d) of one prompt: (T, H·d each), keys first where both are wanted."""
    site = wanted.site if wanted.site in ("keys", "values") else "kv"
    rows = [part.transpose(0, 1).flatten(1) for part in (keys, values)]
    notes = [note, f"site {site}: keys after the rotary embedding"]
    used = _used(rows)
    if used < rows[0].shape[0]:
        notes.append(f"padding: {rows[0].shape[0] - used} unused rows of zeros cut")
        rows = [part[:used] for part in rows]
    start = longest - keys.shape[1]
    if start:
        notes.append(f"rows: a window from position {start}; the positions before it are missing")
    chosen = {"keys": rows[:1], "values": rows[1:]}.get(site, rows)
    return one_prompt(
        name, torch.cat(chosen, 1), wanted, (layer, site), positions_from=start or None, notes=tuple(notes)
    )


def _used(rows: Sequence[Tensor]) -> int:
    """Return how many rows there are before a tail of zeros alone, at least one."""
    there = torch.stack([part.ne(0).any(1) for part in rows]).any(0).nonzero().flatten()
    return int(there[-1]) + 1 if len(there) else 1


def _pair(layer: object, name: str) -> tuple[Tensor, Tensor] | InputError:
    if not isinstance(layer, list | tuple) or len(layer) not in (2, 3) or layer[0] is None or layer[1] is None:
        return InputError(
            f"{name} is missing from the cache: expected (keys, values); save it without sharing or sliding"
        )
    try:
        keys, values = (require_plain(part, name) for part in layer[:2])
    except InputError as error:
        return error
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3] or not keys.numel():
        return ShapeError(
            f"{name}: keys {tuple(keys.shape)} and values {tuple(values.shape)}, expected (batch, heads, tokens, d) "
            "alike; a latent or recurrent cache is not one: save hidden states instead"
        )
    return keys, values


def _raise(error: InputError) -> Dump:
    raise error


def _safely(begin: Callable[[], Iterator[Maker]]) -> Iterator[Maker]:
    """Yield makers; an error in finding them becomes a maker that raises it, so that the next entry is read."""
    try:
        yield from begin()
    except InputError as error:
        yield partial(_raise, error)


def named(name: str, tensors: Mapping[Any, Any], wanted: Wanted) -> Iterator[Maker]:
    """Yield the states under each name: the one asked for, else each that a hook's name or a float matrix tells."""
    keys = [key for key in tensors if isinstance(key, str)]
    pair = pair_in(tensors) if wanted.key is None else None
    if pair is not None:
        beside = {key: tensors[key] for key in (*_IDS, _MASK) if key in tensors and key not in pair}
        yield from _tops(name, tensors[pair[0]], tensors[pair[1]], wanted, beside)
        return
    if wanted.key is not None:
        if wanted.key not in keys:
            raise OptionError(f"{name} holds no {wanted.key[:60]!r}; --key may be one of {', '.join(keys)[:120]}")
        chosen = [wanted.key]
    else:
        hooks = [key for key in keys if (place := place_of_hook(key)) and is_wanted(place, wanted)]
        if not hooks and any(place_of_hook(key) for key in keys):
            raise OptionError(f"{name} holds no hook of the layer and site asked for; ask for another, or say --key")
        floats = [] if hooks else [key for key in keys if _may_be_states(key, tensors[key])]
        chosen = hooks or [key for key in floats if getattr(tensors[key], "ndim", 2) in (2, 3)] or floats
    if not chosen:
        raise InputError(f"{name} holds no tensor of states among {', '.join(keys)[:120] or 'nothing'}; say --key")
    for key in chosen:
        title = f"{name}: {key[:80]}" if len(keys) > 1 else name
        yield from _safely(partial(stacked, title, tensors[key], wanted, place_of_hook(key), tensors))


def _tops(name: str, values: Tensor, token_ids: Tensor, wanted: Wanted, beside: Mapping[Any, Any]) -> Iterator[Maker]:
    """Yield the k largest logits of each prompt's rows, (B, T, k) or (T, k)."""
    refuse_unused(name, wanted, "layers")
    values, token_ids = (part if part.ndim == 3 else part[None] for part in (values, token_ids))
    for number in chosen_prompts(len(values), wanted, name):
        yield partial(_tops_of_batch, name, values, token_ids, number=number, wanted=wanted, beside=beside)


def _tops_of_batch(
    name: str, values: Tensor, token_ids: Tensor, *, number: int, wanted: Wanted, beside: Mapping[Any, Any]
) -> Dump:
    title = name if len(values) == 1 else f"{name}: prompt {number}"
    ids, mask = _ids_and_mask(beside, number, len(values), title)
    kept = slice(None) if mask is None else without_padding(mask, f"{title}: {_MASK}")[0]
    known = None if ids is None else ids_of(ids[kept], f"{title}: ids")
    return of_tensors(title, values[number][kept], token_ids[number][kept], wanted, known)


def _ids_and_mask(beside: Mapping[Any, Any], number: int, count: int, name: str) -> tuple[Tensor | None, Tensor | None]:
    ids = next((_row_of(beside[key], number, count, name) for key in _IDS if key in beside), None)
    return ids, _row_of(beside[_MASK], number, count, name) if _MASK in beside else None


def _may_be_states(key: str, stored: object) -> bool:
    """Return whether a tensor, or an error in its place, may be states: floats, or numbers that floats were put in."""
    if isinstance(stored, Tensor):
        return stored.is_floating_point() or (stored.dtype in (torch.uint16, torch.int16) and key not in (*_IDS, _MASK))
    return isinstance(stored, InputError)


def stacked(
    name: str, stored: object, wanted: Wanted, place: Place | None, beside: Mapping[Any, Any]
) -> Iterator[Maker]:
    """Yield the states of one tensor: layers joined in width or stacked, as `layers` says, else prompts."""
    tensor = require_plain(stored, name)
    notes: tuple[str, ...] = (
        ("layer not in the file",) if place is None else (f"layer {place[0]} (by the hook's name)",)
    )
    if place is not None:
        refuse_unused(name, wanted, "layers")
    if wanted.layers is None:
        if tensor.ndim == 3 and len(tensor) > 1:
            notes = (*notes, "slices of the first axis read as prompts; if they are layers, say --layers")
        yield from batch(name, tensor, wanted, place, beside, *notes)
        return
    k = len(wanted.layers)
    fits = [axis for axis in (0, 1) if tensor.ndim == 3 and tensor.shape[axis] == k]
    if len(fits) == 2:
        raise ShapeError(
            f"{name} of shape {tuple(tensor.shape)} stacks {k} layers along either axis; save (tokens, width)"
        )
    if fits:
        parts = list(tensor.unbind(fits[0]))
    elif tensor.ndim in (2, 3) and tensor.shape[-1] and tensor.shape[-1] % k == 0:
        parts = list(tensor.split(tensor.shape[-1] // k, -1))
    else:
        raise ShapeError(f"{name} of shape {tuple(tensor.shape)} does not hold {k} layers; name as many as are joined")
    for layer, part in zip(chosen_layers(k, wanted, name), parts, strict=True):
        if wanted.layer in (None, layer):
            note = f"layer {layer}, one of {k} joined, as you said"
            yield from _safely(partial(batch, f"{name}: layer {layer}", part, wanted, (layer, "block"), beside, note))


def joined(
    name: str, stored: object, width: int, wanted: Wanted, *, beside: Mapping[Any, Any], hint: str
) -> Iterator[Maker]:
    """Yield each of the states of one width joined along the last axis; layer unknown where the user names none."""
    tensor = require_plain(stored, name)
    if tensor.ndim not in (2, 3) or not width or tensor.shape[-1] % width or not tensor.numel():
        raise ShapeError(f"{name} of shape {tuple(tensor.shape)} does not join states of width {width}; write it again")
    rows = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
    if rows.ndim != 2:
        raise ShapeError(f"{name} of shape {tuple(tensor.shape)} holds several prompts, expected one; write it again")
    k = rows.shape[1] // width
    for number, (layer, part) in enumerate(zip(chosen_layers(k, wanted, name), split_width(rows, width), strict=True)):
        if wanted.layer in (None, layer):
            note = f"layer {layer}, slice {number} of {k}" if layer is not None else f"layer not in the file ({hint})"
            place = (layer, "block")
            yield from batch(f"{name}[{number}]", part, wanted, place, beside, note)
