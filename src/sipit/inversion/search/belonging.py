"""Whether an observation can be a model's at all: asked before any search."""

from __future__ import annotations

from sipit.errors import MismatchError, ShapeError
from sipit.models import LanguageModel
from sipit.observations import Observation


def require_belongs(lm: LanguageModel, seen: Observation) -> None:
    """Refuse an observation that cannot have come from this model.

    Raises:
        OptionError: the model has no such layer or site.
        ShapeError: the states are of another width, or more than the model has positions for.
        MismatchError: they carry another fingerprint, lack positions, or depend on the length of their pass.
    """
    lm.checked_layer(seen.layer, seen.site)
    width = lm.width(seen.site)
    if seen.d_model != width:
        raise ShapeError(
            f"states are {seen.d_model} wide, but site {seen.site!r} of model {lm.name!r} is {width} wide; "
            "name the model they were captured from"
        )
    if seen.fingerprint is not None and seen.fingerprint != lm.fingerprint:
        raise MismatchError(
            f"the states come from the model {seen.model!r} with fingerprint {seen.fingerprint[:19]}…, but "
            f"{lm.name!r} in {lm.dtype} has {lm.fingerprint[:19]}…; load that model in the dtype it was captured "
            "in, or drop the fingerprint from the observation to try anyway"
        )
    if lm.max_positions is not None and seen.seq_len > lm.max_positions:
        raise ShapeError(
            f"the observation has {seen.seq_len} positions, model {lm.name!r} only {lm.max_positions}; "
            "name the model the states were captured from"
        )
    if not seen.is_complete:
        raise MismatchError(
            f"the states start at or skip positions ({seen.seq_len} rows up to position {seen.positions[-1]}); "
            "this version needs every position from 0 on"
        )
