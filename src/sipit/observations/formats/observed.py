"""From what a file of another tool holds to observations that can be inverted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from sipit.errors import InputError, OptionError, SipitError
from sipit.observations.cut import OF_ONE_LAYER, SITES, Site
from sipit.observations.formats.dump import Dump, Place, Wanted
from sipit.observations.observation import Observation

_NARROW = (torch.bfloat16, torch.float16, torch.float32)  # dtypes values may have had before they were widened


def settled_dumps(items: Sequence[Dump | SipitError], wanted: Wanted) -> list[Dump | SipitError]:
    """Return what a file holds, each dump at one known place; one that is not is the error that says so.

    Raises:
        OptionError: the file holds several places, and the user named none.
    """
    places = {(dump.layer, dump.site) for dump in items if isinstance(dump, Dump) and not dump.choices}
    if len(places) > 1 and (wanted.layer, wanted.site, wanted.key, wanted.layers) == (None, None, None, None):
        raise OptionError(f"the file holds {_listed(places)}; choose with --layer, --site or --key")
    return [item if isinstance(item, SipitError) else _placed(item) for item in items]


def observation_of(dump: Dump, n_layers: int) -> Observation:
    """Return the observation that a dump at a known place is.

    Values that a narrower dtype holds exactly, all of them, were rounded to it once: they go back to it,
    so that this rounding is in their tolerance.

    Args:
        dump: of a known site, and a known layer unless that is "final".
        n_layers: of the model, for states behind its final norm.

    Raises:
        InputError, ShapeError, NonFiniteError: its values cannot be states.
    """
    values = narrowed(dump.values)
    first = dump.positions_from or 0
    layer = n_layers if dump.layer is None else dump.layer
    positions = tuple(range(first, first + values.shape[0]))
    try:
        return Observation(states=values, layer=layer, site=cast(Site, dump.site), positions=positions)
    except SipitError as error:
        raise type(error)(f"{dump.name}: {error}") from error


def narrowed(values: Tensor) -> Tensor:
    """Return values in the narrowest dtype that holds each of them exactly. (T, W) → (T, W)."""
    for dtype in _NARROW:
        if dtype.itemsize < values.dtype.itemsize and torch.equal(values.to(dtype).to(values.dtype), values):
            return values.to(dtype).contiguous()
    return values.contiguous()


def observed(items: Iterator[Dump | SipitError], wanted: Wanted, n_layers: int) -> Observation:
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
    return observation_of(cast(Dump, found[0]), n_layers)


def _placed(dump: Dump) -> Dump | SipitError:
    if dump.choices:
        return OptionError(
            f"{dump.name}: versions of its producer differ, and this is {_listed(set(dump.choices))}; "
            "say --layer and --site"
        )
    site = dump.site or ("block" if dump.layer is not None else None)
    if site is None or (dump.layer is None and site not in OF_ONE_LAYER):
        return OptionError(
            f"{dump.name} does not say after how many blocks its states were taken; say --layer, or --layers of "
            "all that are joined in it"
        )
    if site not in SITES:
        return InputError(f"{dump.name} holds {site}, which no version inverts; sites are {', '.join(SITES)}")
    if dump.scales is not None or (dump.rounded or "").startswith(("float8", "int")):
        return InputError(
            f"{dump.name} was rounded to {dump.rounded}, and this version has no tolerance for that rounding; "
            "save the states in float32, bfloat16 or float16"
        )
    return replace(dump, site=site)


def _listed(places: set[Place] | set[tuple[int | None, str | None]]) -> str:
    named = sorted(("" if layer is None else f"layer {layer:4d} ") + f"site {site}" for layer, site in places)
    named = [" ".join(name.split()) for name in named]
    return ", ".join(named) if len(named) < 7 else f"{', '.join(named[:3])}, … {named[-1]} ({len(named)} in all)"
