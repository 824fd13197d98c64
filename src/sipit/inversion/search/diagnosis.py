"""Why nothing fits at a position, as far as the observed rows and what was checked there tell."""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.errors import SipitError
from sipit.inversion.inverses.first_rows import first_rows
from sipit.inversion.inverses.fitted_inverse import FittedInverse
from sipit.inversion.inverses.inverse import Inverse, queries_of
from sipit.inversion.inverses.restored import restored
from sipit.inversion.inverses.ridge_inverse import ridge_inverse
from sipit.inversion.inverses.store import load_fit
from sipit.inversion.inverses.token_keys import token_keys
from sipit.inversion.judging.meter import Meter
from sipit.models import LanguageModel
from sipit.models.everywhere import distinct_cuts
from sipit.observations import Cut, Observation

_STANDS_OUT = 40.0  # times nearer than all others: hardly a chance resemblance
_STANDS_OUT_NARROW = 8.0  # the same where the rows are of a narrower dtype than the arithmetic, which explains it
_UNIT = 1e-3  # of 1, for rows that were all brought to unit length
_ROOM = 1.5  # times the farthest row that is near: what is declared as noise is to cover those not looked at


def diagnosed(
    lm: LanguageModel,
    seen: Observation,
    observed: Tensor,
    position: int,
    *,
    nearest: int,
    distance: float,
    runner_up: float | None,
    limit: float,
) -> str:
    """Return one sentence on the likeliest cause of a miss, and what to try.

    Args:
        lm: the model that was searched with.
        seen: what was observed.
        observed: its states as they are compared, (T, D).
        position: where nothing fits.
        nearest: the token whose state is nearest there.
        distance: its L2.
        runner_up: L2 of the next one.
        limit: tolerance there.
    """
    norms, arithmetic = observed.norm(dim=1), lm.arithmetic
    row = observed[position]
    equal = (observed[:position] == row).all(dim=1).nonzero()[:, 0]
    if not bool(row.any()):
        return "the row is all zeros, as padding is; cut the rows that are no tokens"
    if len(equal):
        return f"the row equals row {int(equal[0])}, as copied or padded rows do; cut the rows that are no tokens"
    if len(observed) > 1 and bool(torch.isclose(norms, torch.ones_like(norms), atol=_UNIT).all()):
        return "every row has length 1, so the states were normalised; capture them as they are"
    if distance <= limit:
        return (
            "the nearest token is within the plain tolerance, but some coordinates are off by more than the rounding "
            "of the stored dtype; the values were changed after they were rounded"
        )
    stored, cut = seen.states.dtype, seen.cut
    narrow = str(stored).removeprefix("torch.") if stored.itemsize < lm.dtype.itemsize else None
    stands_out = _STANDS_OUT if narrow is None else _STANDS_OUT_NARROW
    moved = (
        f"something else than {arithmetic} arithmetic moved the state: try the --pass-dtype (bfloat16, "
        "autocast-bfloat16 and so on) or --quantize it was run in"
        if narrow is None
        else f"the rows hold {narrow} values where it computes in {arithmetic}: try --pass-dtype {narrow}"
    )
    near = _near_as_a_whole(lm, seen, observed, nearest) if position == 0 else None
    moved += f", or declare --noise {max(1.1 * distance, _ROOM * near[1] if near else 0.0):.2g}"
    if runner_up is not None and distance * stands_out < runner_up:
        return (
            f"the nearest token stands out ({runner_up / distance:.0f} times nearer than the next), so this is the "
            f"model, but {moved}"
        )
    if near:
        return (
            f"behind the tokens that the rows read as, row 1 stands out ({near[0]:.0f} times nearer than the next), so "
            f"this is the model, but {moved}"
        )
    otherwise = "" if narrow is None else f"; or a pass in {narrow} made the rows, then try --pass-dtype {narrow}"
    if position == 0 and (elsewhere := _elsewhere(lm, row, cut)):
        return elsewhere + otherwise
    if position == 0:
        return (
            "no token stands out: wrong model, layer or site, or the first rows of the prompt are missing" + otherwise
        )
    return (
        "no token stands out: rows from here on may belong to another prompt, or an earlier token is wrong" + otherwise
    )


def _near_as_a_whole(
    lm: LanguageModel, seen: Observation, observed: Tensor, nearest: int
) -> tuple[float, float] | None:
    """Return how many times nearer row 1 is to the prompt that the rows read as than others are, and how far off.

    A first row may tell little of its token, and be moved by more than that; the rows behind it tell whether this is
    the model. Of the rows that lie as near as row 1, one after the other, the farthest counts. None where it does not.
    """
    if len(observed) <= 2 or not seen.is_complete or seen.is_partial:
        return None
    try:
        read = restored(lm, seen.cut)
        fit = load_fit(lm, read.cut)
        inverse: Inverse = ridge_inverse(lm, read.cut, Meter()) if fit is None else FittedInverse(token_keys(lm), fit)
        rows = read.rows(observed, torch.arange(len(observed)))
        ids = inverse.scores(queries_of(inverse, rows)).argmax(dim=1).cpu()
        if fit is None:
            ids[0] = nearest  # which no inverse reads off a first row without a fit
        own = lm.cut(seen.cut, seq_len=seen.n_positions).ordinary(ids).to(observed)
    except SipitError:  # a site that no inverse reads
        return None
    distances = (observed - own).norm(dim=1)
    usual = float((observed[1:] - own[1:].roll(1, dims=0)).norm(dim=1).median())  # from another row
    near = (distances[1:] * _STANDS_OUT < usual).long().cumprod(dim=0)
    if not near[0]:
        return None
    return usual / max(float(distances[1]), 1e-30), float(distances[: int(near.sum()) + 1].max())


def _elsewhere(lm: LanguageModel, row: Tensor, cut: Cut) -> str | None:
    """Return at which other place the first row fits, or that it is no first row at all; None where neither shows."""
    try:
        looks = first_rows(lm, distinct_cuts(lm, len(row)))
        alike = [like for like in looks.likenesses(row, is_thorough=False) if like.cut != cut]
    except SipitError:  # a layer that this model cannot be cut at
        return None
    if alike:
        return (
            f"row 0 looks like the first state of token {alike[0].token_id} at {alike[0].cut}: were the states taken "
            "there? 'sipit identify' makes sure"
        )
    if not looks.is_like_a_first_one(row, cut):
        return (
            f"no first state of this model at {cut} looks like row 0, so the rows before it are missing (a cache hit, "
            "a dropped BOS: pass --prefix-text or --prefix-ids), or the model or layer is another: see 'sipit identify'"
        )
    return None
