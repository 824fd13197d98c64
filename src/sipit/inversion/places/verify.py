"""Is a dump what its label says? One ordinary pass of the ids beside it, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sipit.errors import InputError, ShapeError
from sipit.inversion.judging.replay import Replay, replay
from sipit.inversion.places.whereabouts import Place, places_of
from sipit.inversion.search.belonging import require_belongs
from sipit.models import LanguageModel
from sipit.observations import Observation

_MOVED = 0.5  # of its length that a row may lie from its own state to be called that state, moved
_MOST_OTHERS = 64  # other prompts that bad rows are looked for in


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that is not the state its label says."""

    row: int  # 0-based, in the file
    distance: float  # L2 to the state that it should be; 0 tokens beside it: its length
    tolerance: float  # largest distance that arithmetic and rounding explain
    instead: str | None  # what it is instead, as far as was found


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Which rows of a dump hold."""

    model: str
    layer: int
    site: str
    rows: int
    first_position: int  # of the prompt, that the first row is
    bad_rows: tuple[BadRow, ...]

    @property
    def holds(self) -> bool:
        """Whether every row is the state that its label says."""
        return not self.bad_rows

    def record(self) -> dict[str, Any]:
        """Return the verification as a JSON object."""
        return {**asdict(self), "holds": self.holds}


def verify(
    lm: LanguageModel,
    seen: Observation,
    input_ids: Sequence[int] | Tensor,
    *,
    others: Sequence[Sequence[int]] = (),
) -> Verification:
    """Check every row of a dump against the state that the token ids beside it have in the model.

    Where there are more ids than rows, the rows are looked for along them: a cache hit leaves out the first ones.

    Args:
        lm: the model that the label names.
        seen: the rows, at the layer and site that the label names.
        input_ids: the token ids beside them, known prefix included. (P,)
        others: ids of other prompts, in whose states bad rows are looked for.

    Raises:
        InputError: an id is outside the vocabulary.
        OptionError, ShapeError, MismatchError: the rows cannot be this model's.
    """
    ids = torch.as_tensor(input_ids).long().flatten()
    if not len(ids) or bool(((ids < 0) | (ids >= lm.vocab_size)).any()):
        raise InputError(
            f"the ids beside the rows are none of {lm.name!r}'s (0 to {lm.vocab_size - 1}); name its model"
        )
    if lm.max_positions is not None and len(ids) > lm.max_positions:
        raise ShapeError(f"{len(ids)} ids lie beside the rows, model {lm.name!r} has {lm.max_positions} positions")
    first = _first_position(lm, seen, ids)
    inside = [row for row in range(seen.seq_len) if 0 <= first + row < len(ids)]
    held = _rows(seen, inside, first)
    require_belongs(lm, _rows(seen, inside, 0))
    found = replay(lm, held, ids)
    bad = [n for n in range(len(inside)) if float(found.over[n]) > 0]
    instead = _instead(lm, held, found, bad=bad, ids=ids, others=others)
    bad_rows = [
        BadRow(
            row=inside[n],
            distance=float(found.distances[n]),
            tolerance=float(found.allowed[n]),
            instead=says,
        )
        for n, says in zip(bad, instead, strict=True)
    ]
    bad_rows += [
        BadRow(
            row=row,
            distance=float(seen.states[row].cpu().double().norm()),
            tolerance=0.0,
            instead="a row without a token",
        )
        for row in sorted(set(range(seen.seq_len)) - set(inside))
    ]
    return Verification(
        model=lm.name,
        layer=seen.layer,
        site=seen.site,
        rows=seen.seq_len,
        first_position=first,
        bad_rows=tuple(sorted(bad_rows, key=lambda each: each.row)),
    )


def _rows(seen: Observation, rows: Sequence[int], first: int) -> Observation:
    """Return some consecutive rows of an observation, at the positions they have when its row 0 is at `first`."""
    chosen = torch.tensor(list(rows))
    return replace(
        seen,
        states=seen.states[chosen],
        half_step=None if seen.half_step is None else seen.half_step[chosen],
        positions=tuple(first + row for row in rows),
        known_prefix=(),
    )


def _first_position(lm: LanguageModel, seen: Observation, ids: Tensor) -> int:
    """Return the position of row 0: the declared one, or where along the ids most rows lie nearest."""
    declared = seen.positions[0]
    if declared or len(ids) == seen.seq_len:
        return declared
    states = lm.cut(seen.cut, seq_len=len(ids)).ordinary(ids).float().cpu()  # (P, W)
    rows = seen.states.float()
    shifts = range(min(0, len(ids) - seen.seq_len), max(0, len(ids) - seen.seq_len) + 1)

    def misfit(shift: int) -> float:
        pairs = [(row, row + shift) for row in range(len(rows)) if 0 <= row + shift < len(ids)]
        mine = rows[[row for row, _ in pairs]]
        apart = (mine - states[[position for _, position in pairs]]).norm(dim=1)
        return float((apart / mine.norm(dim=1).clamp(min=1e-30)).median())

    return min(shifts, key=misfit)


def _instead(
    lm: LanguageModel,
    held: Observation,
    found: Replay,
    *,
    bad: Sequence[int],
    ids: Tensor,
    others: Sequence[Sequence[int]],
) -> list[str | None]:
    """Return what each bad row is, as far as it can be told; the simplest explanation first."""
    if not bad:
        return []
    says: dict[int, str] = {}
    rows, states = found.observed.float().cpu(), found.states.float().cpu()  # (T, W)
    shift = _common_shift(rows, states, bad)
    for n in bad:
        if not bool(rows[n].any()):
            says[n] = "all zeros, as padding is"
        elif shift is not None:
            says[n] = f"its own state plus a vector of length {float(shift.norm()):.4g}, the same in all bad rows"
    left = [n for n in bad if n not in says]
    for n, place in zip(left, _places(lm, rows, left, ids), strict=True):
        if place is not None and not _is_own(place, held, n):
            says[n] = str(place)
        elif place is not None and place.apart < 0.1 * abs(place.scale - 1):
            says[n] = f"its own state times {place.scale:.6g}"
    left = [n for n in bad if n not in says]
    for number, other in enumerate(others[:_MOST_OTHERS]):
        if not left:
            break
        other_ids = torch.as_tensor(other).long()
        if torch.equal(other_ids, ids) or not len(other_ids) or bool((other_ids >= lm.vocab_size).any()):
            continue
        for n, place in zip(left, _places(lm, rows, left, other_ids), strict=True):
            if place is not None:
                says[n] = f"prompt {number} of these: {place}"
        left = [n for n in left if n not in says]
    for n in left:
        own, apart = states[n], float((rows[n] - states[n]).norm() / rows[n].norm())
        if apart < _MOVED:
            says[n] = f"its own state, {100 * apart:.2g} % of its length away: noise, another dtype or rounding"
        elif torch.allclose(rows[n].sort().values, own.sort().values, rtol=1e-3, atol=1e-3 * float(own.std())):
            says[n] = "its own state with the columns in another order"
    return [says.get(n) for n in bad]


def _places(lm: LanguageModel, rows: Tensor, chosen: Sequence[int], ids: Tensor) -> list[Place | None]:
    return places_of(lm, rows[list(chosen)], ids) if chosen else []


def _is_own(place: Place, held: Observation, n: int) -> bool:
    """Whether a place is where the row should come from, but for a scale."""
    return place.cut == held.cut and place.position == held.positions[n] and not place.is_update


def _common_shift(rows: Tensor, states: Tensor, bad: Sequence[int]) -> Tensor | None:
    """Return the vector by which all bad rows are off, where it is one and the same."""
    if len(bad) < 2:
        return None
    off = rows[list(bad)] - states[list(bad)]  # (N, W)
    mean = off.mean(dim=0)
    spread = (off - mean).norm(dim=1)
    return mean if bool((spread <= 0.05 * mean.norm()).all()) else None
