"""Whether an observation can be a model's at all: asked before any search."""

from __future__ import annotations

from sipit.errors import InputError, MismatchError, NonFiniteError, ShapeError
from sipit.models import LanguageModel
from sipit.observations import Observation
from sipit.storage import shown


def require_belongs(lm: LanguageModel, seen: Observation) -> None:
    """Refuse an observation that cannot have come from this model.

    Raises:
        OptionError: the model has no such layer or site.
        NonFiniteError: distances to such values overflow.
        ShapeError: the states are of another width, or more than the model has positions for.
        MismatchError: they carry another fingerprint, or lack positions before the first block.
        InputError: the known prefix holds an id outside the vocabulary.
    """
    lm.checked_layer(seen.layer, seen.site)
    width = lm.width(seen.cut)
    if seen.d_model != width:
        raise ShapeError(
            f"states are {seen.d_model} wide, but site {seen.site!r} of model {lm.name!r} is {width} wide; "
            "name the model they were captured from, or their site"
        )
    lengths = seen.states.float().norm(dim=1)  # (T,)
    if not bool(lengths.isfinite().all()):
        row = int((~lengths.isfinite()).nonzero()[0, 0])
        raise NonFiniteError(
            f"row {row} holds values up to {float(seen.states[row].abs().max()):.2g}, so large that their squares "
            "overflow float32; no model's states are: check how the file was read"
        )
    if seen.fingerprint is not None and seen.fingerprint != lm.fingerprint:
        raise MismatchError(
            f"the states come from the model {shown(seen.model or '')!r} with fingerprint {seen.fingerprint[:19]}…, "
            f"but {lm.name!r} in {lm.dtype} has {lm.fingerprint[:19]}…; load that model in the dtype it was captured "
            "in, or drop the fingerprint from the observation to try anyway"
        )
    if lm.max_positions is not None and seen.n_positions > lm.max_positions:
        raise ShapeError(
            f"the observation has {seen.n_positions} positions, model {lm.name!r} only {lm.max_positions}; "
            "name the model the states were captured from"
        )
    if not seen.is_complete and seen.layer == 0:
        raise MismatchError(
            f"the {seen.seq_len} rows do not hold every position behind the {len(seen.known_prefix)} tokens known "
            "before them, and before the first block no row tells of another's token; capture after a block"
        )
    outside = [i for i in seen.known_prefix if not 0 <= i < lm.vocab_size]
    if outside:
        raise InputError(
            f"the known prefix holds token id {outside[0]}, outside the vocabulary of {lm.name!r} "
            f"(0 to {lm.vocab_size - 1})"
        )
