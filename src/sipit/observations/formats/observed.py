"""From what a file of another tool holds to observations that can be inverted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from sipit.errors import InputError, OptionError, SipitError
from sipit.observations.cut import OF_ONE_LAYER, SITES, Site
from sipit.observations.formats.dump import Dump, ModelShape, Place, Wanted
from sipit.observations.observation import DTYPES, Observation
from sipit.observations.rounding import as_rounded, of_decimals, of_float8


def settled_dumps(items: Sequence[Dump | SipitError], wanted: Wanted) -> list[Dump | SipitError]:
    """Return what a file holds, each dump at one known place; one that is not is the error that says so.

    Raises:
        OptionError: the file holds several places, and the user named none.
    """
    places = {(dump.layer, dump.site) for dump in items if isinstance(dump, Dump) and not dump.choices}
    if len(places) > 1 and (wanted.layer, wanted.site, wanted.key, wanted.layers) == (None, None, None, None):
        raise OptionError(f"the file holds {_listed(places)}; choose with --layer, --site or --key")
    return [item if isinstance(item, SipitError) else _placed(item, wanted) for item in items]


def observation_of(dump: Dump, shape: ModelShape) -> Observation:
    """Return the observation that a dump at a known place is.

    The rounding that the file names, or that shows in the values, is in the observation, and so in the tolerance.

    Args:
        dump: of a known site, and a known layer unless that is "final".
        shape: of the model.

    Raises:
        InputError, ShapeError, NonFiniteError: its values cannot be states.
    """
    dump = in_halves(dump, shape)
    values, _, half_step = rounded(dump)
    if dump.columns is not None:
        values, half_step = _spread(dump, values, half_step, shape.vocab_size)
    first = dump.positions_from or 0
    layer = shape.n_layers if dump.layer is None else dump.layer
    positions = tuple(range(first, first + values.shape[0]))
    try:
        return Observation(
            states=values, layer=layer, site=cast(Site, dump.site), positions=positions, half_step=half_step
        )
    except SipitError as error:
        raise type(error)(f"{dump.name}: {error}") from error


def in_halves(dump: Dump, shape: ModelShape) -> Dump:
    """Return a dump whose keys lie as transformers lays them, if its producer keeps rotary pairs side by side.

    Raises:
        InputError: the keys do not divide into the model's heads.
    """
    if not dump.is_interleaved:
        return dump
    order = _halves_of_pairs(dump, dump.values.shape[1], shape.d_head)
    return replace(dump, values=dump.values[:, order].contiguous(), is_interleaved=False)


def unpadded(dump: Dump) -> Dump:
    """Return a dump without the rows of zeros at either end, which are padding; those of an embedding may be tokens."""
    filled = dump.values.ne(0).any(dim=1).nonzero()[:, 0].tolist()
    if dump.layer == 0 or not filled or len(filled) == len(dump.values):
        return dump
    kept = slice(filled[0], filled[-1] + 1)
    n_cut = len(dump.values) - (kept.stop - kept.start)
    if not n_cut:
        return dump
    ids = dump.input_ids
    return replace(
        dump,
        values=dump.values[kept],
        scales=None if dump.scales is None else dump.scales[kept],
        columns=None if dump.columns is None else dump.columns[kept],
        input_ids=ids[kept] if ids is not None and len(ids) == len(dump.values) else ids,
        notes=(*dump.notes, f"padding: {n_cut} rows of zeros cut ({kept.start} before, {n_cut - kept.start} behind)"),
    )


def _spread(
    dump: Dump, values: Tensor, half_step: Tensor | None, vocab_size: int | None
) -> tuple[Tensor, Tensor | None]:
    """Put the values of some columns where they belong; the others are not held. (T, k) → (T, V).

    Raises:
        InputError: a column lies outside the vocabulary.
    """
    columns = dump.columns
    assert columns is not None
    if vocab_size is None or int(columns.max()) >= vocab_size:
        raise InputError(
            f"{dump.name} names token id {int(columns.max())}, the model's vocabulary has {vocab_size}; name its model"
        )
    rows, places = (columns >= 0).nonzero(as_tuple=True)
    held = columns[rows, places]
    lowest = values.float().min(dim=1, keepdim=True).values.to(values.dtype)  # what is not held counts as no more
    whole = lowest.expand(len(values), vocab_size).clone()
    whole[rows, held] = values[rows, places]
    steps = torch.full(whole.shape, torch.inf)
    steps[rows, held] = 0.0 if half_step is None else half_step[rows, places]
    return whole, steps


def _halves_of_pairs(dump: Dump, width: int, d_head: int | None) -> Tensor:
    """Return the columns in transformers' order: of each head the first of all pairs, then the second. (W,).

    Raises:
        InputError: the keys do not divide into heads.
    """
    n_keys = width // 2 if dump.site == "kv" else width
    if not d_head or n_keys % d_head or d_head % 2:
        raise InputError(f"{dump.name}: keys {n_keys} wide are not heads of {d_head or 'unknown'}; name its model")
    keys = torch.arange(n_keys).view(-1, d_head // 2, 2).transpose(1, 2).reshape(-1)
    return torch.cat([keys, torch.arange(n_keys, width)])


def rounded(dump: Dump) -> tuple[Tensor, str | None, Tensor | None]:
    """Return the values of a dump in the dtype they had, the coarser rounding they went through, and its half steps.

    (T, W), in words or None, (T, W) or None.
    """
    said = dump.rounded or ""
    if dump.scales is not None:
        found = of_float8(dump.values, dump.scales, getattr(torch, said))
    elif said.startswith("decimals:"):
        found = of_decimals(dump.values, int(said.removeprefix("decimals:")))
    elif said in DTYPES:
        return dump.values.to(DTYPES[said]).contiguous(), None, None
    else:
        return as_rounded(dump.values, is_embedding=dump.layer == 0)
    return dump.values.float().contiguous(), found.says, found.half_step


def observed(items: Iterator[Dump | SipitError], wanted: Wanted, shape: ModelShape) -> Observation:
    """Return the one observation among what a file holds.

    Raises:
        SipitError: it cannot be read, or its place is not known.
        OptionError: the file holds several.
    """
    found = settled_dumps(list(items), wanted)
    for item in found:
        if isinstance(item, SipitError):
            raise item
    if len(found) != 1:
        raise OptionError(f"the file holds {len(found)} prompts or places; read one of them with its key or prompt")
    return observation_of(unpadded(cast(Dump, found[0])), shape)


def _placed(dump: Dump, wanted: Wanted) -> Dump | SipitError:
    if dump.choices:
        return OptionError(
            f"{dump.name}: versions of its producer differ, and this is {_listed(set(dump.choices))}; "
            "say --layer and --site, or let 'sipit identify' find out"
        )
    site = dump.site or ("block" if dump.layer is not None else None)
    if site is None or (dump.layer is None and site not in OF_ONE_LAYER):
        return OptionError(
            f"{dump.name} does not say after how many blocks its states were taken; say --layer, or --layers of "
            "all that are joined in it, or let 'sipit identify' find out"
        )
    if site not in SITES:
        return InputError(f"{dump.name} holds {site}, which no version inverts; sites are {', '.join(SITES)}")
    dump = replace(dump, site=site)
    if wanted.dtype in DTYPES and dump.scales is None:
        dump = replace(dump, rounded=wanted.dtype)
    values, coarser, _ = rounded(dump)
    dtype = str(values.dtype).removeprefix("torch.")
    note = f"dtype: {coarser or dtype}" + (" (seen in the values; --states-dtype overrides)" if coarser else "")
    return replace(dump, notes=(*dump.notes, note) if coarser or dtype != "float32" else dump.notes)


def _listed(places: set[Place] | set[tuple[int | None, str | None]]) -> str:
    named = sorted(("" if layer is None else f"layer {layer:4d} ") + f"site {site}" for layer, site in places)
    named = [" ".join(name.split()) for name in named]
    return ", ".join(named) if len(named) < 7 else f"{', '.join(named[:3])}, … {named[-1]} ({len(named)} in all)"
