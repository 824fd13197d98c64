"""From tensors of a file to the rows of one prompt: shapes, types, values and ids checked in one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sipit.errors import InputError, NonFiniteError, OptionError, ShapeError
from sipit.observations.formats.dump import Dump, Place, Wanted
from sipit.observations.observation import DTYPES, dtype_named

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_MAX_ID = 1 << 31  # no vocabulary is as large


def name_of(dtype: torch.dtype) -> str:
    """Return what a dtype is called without its library."""
    return str(dtype).removeprefix("torch.")


def require_plain(tensor: object, name: str) -> Tensor:
    """Return a tensor whose values lie in memory once each; anything else could be larger than its file.

    Raises:
        InputError: it is no tensor, or is sparse, quantised, on no device, or repeats its storage.
    """
    if isinstance(tensor, InputError):  # of a reader, in the place of a tensor it could not read
        raise tensor
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} is {_a(type(tensor).__name__)}, expected a tensor of states; name another with --key")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise InputError(f"{name} is not a plain dense tensor; save it again as tensor.dequantize().cpu()")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{name} repeats the same memory for several rows; save it again as tensor.clone()")
    return tensor


def floats_of(tensor: Tensor, name: str) -> tuple[Tensor, str | None]:
    """Return values as floats, and the precision they once had where their dtype tells it.

    Raises:
        InputError: the dtype holds no numbers a state can have.
    """
    if tensor.dtype in DTYPES.values():
        return tensor, None
    if tensor.dtype in _FLOAT8:
        return tensor.to(torch.float32), name_of(tensor.dtype)
    if tensor.dtype == torch.int16:
        return tensor.to(torch.float32), "int16"
    raise InputError(
        f"{name} has dtype {name_of(tensor.dtype)}, expected {', '.join(DTYPES)}; "
        "quantised values need their scales: save them dequantised, or the raw run"
    )


def raw_as(tensor: Tensor, dtype: str | None, name: str) -> Tensor:
    """Return the bytes of an array that lost its type as the floats the user says they are.

    Raises:
        OptionError: the user names no dtype, or one of another size.
    """
    size = tensor.element_size()
    known = {**DTYPES, **{name_of(kind): kind for kind in _FLOAT8}}
    fitting = [each for each, kind in known.items() if kind.itemsize == size]
    if dtype not in fitting:
        said = "no dtype" if dtype is None else f"--states-dtype {dtype[:20]}"
        raise OptionError(
            f"{name} holds raw values of {size} bytes and {said} tells their type; say --states-dtype "
            f"{' or '.join(fitting) if fitting else dtype_named('float32')}"
        )
    return tensor.view(known[dtype])


def require_rows(values: Tensor, name: str) -> Tensor:
    """Return (T, W) values after a look at shape and numbers.

    Raises:
        ShapeError: not two-dimensional, or empty.
        NonFiniteError: a row holds NaN or infinity.
    """
    if values.ndim != 2:
        raise ShapeError(
            f"{name} has shape {tuple(values.shape)}, expected (tokens, width): one prompt, a row for each token"
        )
    if not values.numel():
        raise ShapeError(f"{name} has shape {tuple(values.shape)}: it holds no token; save a prompt that has some")
    good = torch.isfinite(values).all(dim=1)
    if not bool(good.all()):
        bad = int((~good).nonzero()[0, 0])
        raise NonFiniteError(
            f"{name} holds NaN or infinity at row {bad} of {values.shape[0]}; "
            "save it again in a wider dtype (float16 overflows above 65,504)"
        )
    return values


def ids_of(listed: object, name: str) -> tuple[int, ...]:
    """Return token ids as whole numbers.

    Args:
        listed: a tensor (T,) or (1, T), or a list of numbers.

    Raises:
        InputError: they are not token ids.
    """
    if isinstance(listed, Tensor):
        require_plain(listed, name)
        listed = listed[0] if listed.ndim == 2 and listed.shape[0] == 1 else listed
        if listed.ndim != 1 or listed.dtype not in _WHOLE:
            raise InputError(
                f"{name} has shape {tuple(listed.shape)} and dtype {name_of(listed.dtype)}, "
                "expected (tokens,) whole numbers; the file is not what its producer writes"
            )
        listed = listed.tolist()
    if not isinstance(listed, list | tuple) or not all(type(i) is int and 0 <= i < _MAX_ID for i in listed):
        raise InputError(f"{name} holds something else than token ids from 0; have its producer write it again")
    return tuple(listed)


def require_same_length(rows: int, ids: Sequence[int] | None, name: str) -> None:
    """Refuse ids that cannot belong to the rows beside them.

    Raises:
        InputError: their numbers differ.
    """
    if ids is not None and len(ids) != rows:
        raise InputError(
            f"{name} holds {rows} rows beside {len(ids)} token ids: they do not belong together; "
            "have its producer write it again"
        )


def is_wanted(place: Place, wanted: Wanted) -> bool:
    """Return whether a place is one that the user's words leave open."""
    layer, site = place
    return (wanted.layer is None or layer is None or layer == wanted.layer) and (
        wanted.site is None or wanted.site == site or (site == "kv" and wanted.site in ("keys", "values"))
    )


def chosen_prompts(n_prompts: int, wanted: Wanted, name: str) -> range:
    """Return the prompts to read of those a file holds.

    Raises:
        OptionError: the one asked for is not there.
    """
    if wanted.prompt is None:
        return range(n_prompts)
    if not 0 <= wanted.prompt < n_prompts:
        held = "one prompt, number 0" if n_prompts == 1 else f"prompts 0 to {n_prompts - 1}"
        raise OptionError(f"{name} holds {held}; --prompt {wanted.prompt} is not there")
    return range(wanted.prompt, wanted.prompt + 1)


def refuse_unused(name: str, wanted: Wanted, *words: str) -> None:
    """Refuse options that say nothing of a file: what was meant by them is something else than what would be read.

    Args:
        words: "key", where nothing in the file has a name; "layers", where nothing is joined in it.

    Raises:
        OptionError: one of them was given.
    """
    for word, reason in (("key", "what it holds has no names"), ("layers", "it tells its layers, or joins none")):
        if word in words and getattr(wanted, word) is not None:
            raise OptionError(f"{name} has no use for --{word}: {reason}; leave it out")


def chosen_layers(n_columns: int, wanted: Wanted, name: str, *, are_sorted: bool = False) -> list[int | None]:
    """Return the layer of each of the columns a file holds, None where neither user nor file says.

    Args:
        n_columns: how many states are joined in the file.
        are_sorted: the producer writes them by rising layer, whatever was asked of it.

    Raises:
        OptionError: the user names another number of layers, or one layer of several unnamed columns.
    """
    if wanted.layers is None:
        if n_columns > 1 and wanted.layer is not None:
            raise OptionError(
                f"{name} joins {n_columns} layers and does not say which: --layer {wanted.layer} alone does not tell; "
                f"say --layers with all {n_columns}, or let 'sipit identify' find them"
            )
        return [wanted.layer] * n_columns
    if len(wanted.layers) != n_columns or len(set(wanted.layers)) != n_columns:
        joined = f"joins {n_columns} layer{'s' if n_columns > 1 else ''}"
        raise OptionError(
            f"{name} {joined}, --layers names {len(wanted.layers)}; name each once, in the order they were captured "
            "(a producer may have dropped the last)"
        )
    if wanted.layer is not None and wanted.layer not in wanted.layers:
        raise OptionError(f"{name}: --layer {wanted.layer} is not among --layers; ask for one of them")
    return list(sorted(wanted.layers) if are_sorted else wanted.layers)


def settled(dump: Dump, wanted: Wanted) -> Dump:
    """Return a dump with its rows checked and the user's word applied to its place.

    The user's word decides what the file leaves open, and wins over a producer's habit; a note says so.
    """
    require_rows(dump.values, dump.name)
    layer, site, choices, notes = dump.layer, dump.site, dump.choices, list(dump.notes)
    if choices and (wanted.layer is not None or wanted.site is not None):
        left = tuple(dict.fromkeys((wanted.layer if at is None else at, kind) for at, kind in choices))
        choices = tuple(place for place in left if is_wanted(place, wanted))
        if len(choices) == 1:
            (layer, site), choices = choices[0], ()
    if wanted.layer is not None and layer != wanted.layer and not choices:
        notes.append(f"layer {wanted.layer}, as you said{'' if layer is None else f' (the file says {layer})'}")
        layer = wanted.layer
    if wanted.site is not None and site != wanted.site and not choices:
        notes.append(f"site {wanted.site}, as you said{'' if site is None else f' (the producer means {site})'}")
        site = wanted.site
    if choices:
        layer = site = None
    return replace(dump, layer=layer, site=site, choices=choices, notes=tuple(notes))


def one_prompt(name: str, stored: Tensor, wanted: Wanted, place: Place | None, **more: object) -> Dump:
    """Return the dump of (T, W) values at a place that may be unknown; `more` are fields of it."""
    require_plain(stored, name)
    raw = stored.dtype == torch.uint16 or (wanted.dtype is not None and stored.dtype == torch.uint8)
    values, rounded = floats_of(raw_as(stored, wanted.dtype, name) if raw else stored, name)
    layer, site = place or (None, None)
    dump = Dump(name=name, values=values, layer=layer, site=site, rounded=rounded)
    notes = more.pop("notes", ())
    assert isinstance(notes, tuple)
    notes = (*notes, f"dtype {name_of(stored.dtype)}", f"rows {stored.shape[0] if stored.ndim else 0}")
    if rounded is not None:
        notes += (f"scale: none beside, {rounded} values taken as they are",)
    return settled(replace(dump, notes=notes, **more), wanted)  # type: ignore[arg-type]


def without_padding(mask: Tensor, name: str) -> tuple[slice, str | None]:
    """Return the rows that an attention mask (T,) keeps, and a note where some are cut.

    Raises:
        InputError: the mask keeps nothing, or has holes.
    """
    kept = require_plain(mask, name).ne(0).nonzero().flatten()
    if mask.ndim != 1 or not len(kept) or int(kept[-1]) - int(kept[0]) + 1 != len(kept):
        raise InputError(
            f"{name} of shape {tuple(mask.shape)} does not keep one run of rows; save each prompt without its padding"
        )
    first, last = int(kept[0]), int(kept[-1]) + 1
    cut = mask.shape[0] - len(kept)
    sides = [side for side, there in (("left", first > 0), ("right", last < mask.shape[0])) if there]
    return slice(first, last), f"padding: {cut} rows cut ({' and '.join(sides)}, by the mask)" if cut else None


def split_width(values: Tensor, width: int) -> Iterator[Tensor]:
    """Yield the (T, width) states joined along the last axis of (T, k·width) values."""
    for start in range(0, values.shape[1], width):
        yield values[:, start : start + width]


def _a(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"
