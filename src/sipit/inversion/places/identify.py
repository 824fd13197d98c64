"""Which model, layer and site some rows fit, by their first rows: proposed by likeness, decided by the check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sipit.errors import ShapeError, SipitError
from sipit.inversion.inverses.first_rows import FirstRows, Likeness, first_rows
from sipit.inversion.invert import invert
from sipit.inversion.judging.replay import replay
from sipit.inversion.judging.tolerance import half_ulp
from sipit.inversion.places.whereabouts import places_of
from sipit.models import LanguageModel
from sipit.models.everywhere import distinct_cuts
from sipit.models.sites import SITES
from sipit.observations import Cut, Observation
from sipit.observations.rounding import as_rounded

_CONFIRMED = 3  # rows that are inverted to confirm a fit
_STARTS = 3  # rows that are tried as the prompt's first one
_EXACT_SCALE = 1e-3  # nearer to 1 a scale is 1, and what is left of it noise or rounding
_LUCK = 4.0  # standard deviations that the measured scale of rounded values may be off
_UNIT = 1e-3  # nearer to 1 than this all lengths are 1


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A place that the first rows fit."""

    model: str
    dtype: str  # of the weights they fit in
    layer: int
    site: str
    scale: float  # the rows are this many times what the model computes
    offset: int  # rows before the first one of the prompt: padding
    columns: tuple[int, int] | None  # of the file, where several places are joined in its columns
    distance: float  # largest L2 of a row to the state it is, in the model's units
    tolerance: float  # there
    rows: int  # that were checked


@dataclass(frozen=True, kw_only=True)
class Identification:
    """What some rows fit, and what they nearly fit."""

    fits: tuple[Fit, ...]  # best first; empty where none
    near: tuple[str, ...]  # what looks alike and is beyond tolerance, one sentence each

    def record(self) -> dict[str, Any]:
        """Return the identification as a JSON object."""
        return asdict(self)


def identify(
    lm: LanguageModel, rows: Tensor, *, input_ids: Sequence[int] | None = None, is_thorough: bool = True
) -> Identification:
    """Find where rows come from, among all layers and sites of a model.

    Args:
        lm: the model.
        rows: (T, W) as stored; rows of zeros before the first one are padding.
        input_ids: the ids that lie beside the rows, if any, padding left out.
        is_thorough: whether every token is tried as the first one where likely ones do not fit.

    Raises:
        ShapeError: the rows are not two-dimensional.
    """
    if rows.ndim != 2 or not rows.shape[0] or not rows.shape[1]:
        raise ShapeError(f"rows have shape {tuple(rows.shape)}, expected (rows, width); pass those of one prompt")
    fits: list[Fit] = []
    near: list[str] = []
    for columns, values in _parts(lm, rows.cpu()):
        found = _Search(lm, values, columns, input_ids, is_thorough)
        fits += found.fits
        near += found.near
    fits.sort(key=lambda fit: (fit.columns or (0, 0), fit.distance / max(fit.tolerance, 1e-30)))
    return Identification(fits=tuple(fits), near=tuple(near))


def _parts(lm: LanguageModel, rows: Tensor) -> Iterator[tuple[tuple[int, int] | None, Tensor]]:
    """Yield the columns that belong together: all, or as many as the model is wide where several places are joined."""
    width = int(rows.shape[1])
    if distinct_cuts(lm, width) or width % lm.d_model or width == lm.d_model:
        yield None, rows
        return
    for start in range(0, width, lm.d_model):
        yield (start, start + lm.d_model), rows[:, start : start + lm.d_model]


class _Search:
    """The search for one width: likenesses of possible first rows, each confirmed by the check or not."""

    def __init__(
        self,
        lm: LanguageModel,
        values: Tensor,
        columns: tuple[int, int] | None,
        input_ids: Sequence[int] | None,
        is_thorough: bool,
    ) -> None:
        self.fits: list[Fit] = []
        self.near: list[str] = []
        self._lm = lm
        self._columns = columns
        self._stored, _, self._half_step = as_rounded(values)
        self._rows = self._stored.float()  # (T, W)
        cuts = distinct_cuts(lm, int(values.shape[1]))
        filled = [int(i) for i in self._rows.any(dim=1).nonzero()[:, 0]]
        if not cuts or not filled:
            self.near.append(
                f"nothing in {lm.name!r} is {values.shape[1]} wide" if not cuts else "all rows are zeros, as padding is"
            )
            return
        if input_ids:
            self._by_ids(list(input_ids), filled)
        if not self.fits:
            self._by_first_row(filled, cuts, is_thorough)

    def _by_ids(self, input_ids: list[int], filled: list[int]) -> None:
        """Look for some rows among all states of the ids beside them."""
        if not all(0 <= i < self._lm.vocab_size for i in input_ids):
            return
        ids = torch.tensor(input_ids)
        rows = filled[-_CONFIRMED:]
        for row, place in zip(rows, places_of(self._lm, self._rows[rows], ids), strict=True):
            offset = row - place.position if place is not None else -1
            if place is None or place.is_update or not 0 <= offset <= row:
                continue
            shown = range(offset, min(len(self._rows), offset + len(ids)))
            cut = self._unit_cut(place.cut)
            scale = place.scale if cut == place.cut else 1.0
            seen = self._observation(cut, scale, shown)
            held = replay(self._lm, seen, ids)
            if bool((held.over <= 0).all()):
                self._fit(seen, self._said_scale(scale), offset, held.distances, held.allowed)
                return

    def _by_first_row(self, filled: list[int], cuts: Sequence[Cut], is_thorough: bool) -> None:
        looks = first_rows(self._lm, cuts)
        for start in self._starts(filled, looks):
            blur = self._blur(start)
            every = is_thorough and start == filled[0]
            for like in looks.likenesses(self._rows[start], blur=blur, is_thorough=every):
                self._confirm(like, start)
            if self.fits:
                return

    def _starts(self, filled: list[int], looks: FirstRows) -> list[int]:
        """Return rows that may be the prompt's first one: the first that is filled, then others that look like one."""
        alike = [filled[i] for i in looks.first_like(self._rows[filled])]
        after_equal = [row for row in filled if row and torch.equal(self._rows[row - 1], self._rows[filled[0]])]
        found = [filled[0], *after_equal[-1:], *alike]
        return list(dict.fromkeys(found))[:_STARTS]

    def _blur(self, row: int) -> Tensor:
        step = half_ulp(self._stored[row : row + 1])[0].float() if self._stored.dtype.itemsize < 4 else 0
        coarse = 0 if self._half_step is None else self._half_step[row]
        return torch.zeros_like(self._rows[row]) + step + coarse

    def _confirm(self, like: Likeness, start: int) -> None:
        """Check the rows at a place that the first one looks like, the first by its token, the next by inversion."""
        lm = self._lm
        cut = self._unit_cut(like.cut)
        own = lm.cut(cut, seq_len=len(self._rows) - start).ordinary(torch.tensor([like.token_id]))[0].cpu().double()
        row = self._rows[start].double()
        scale = float(row @ own) / max(float(own.square().sum()), 1e-30)
        if scale <= 0:
            return
        shown = range(start, min(len(self._rows), start + _CONFIRMED))
        try:
            first = self._observation(cut, scale, shown[:1])
            held = replay(lm, first, torch.tensor([like.token_id]))
            if float(held.over[0]) > 0:
                self.near.append(
                    f"{lm.name}, {cut}: row {start} points where the first row of token {like.token_id} does, but is "
                    f"{float(held.distances[0]):.3g} away, tolerance {float(held.allowed[0]):.3g}"
                )
                return
            seen = self._observation(cut, scale, shown)
            found = invert(lm, seen, hint=[like.token_id], use_fit=False)
        except SipitError as error:
            self.near.append(f"{lm.name}, {cut}: {error}")
            return
        if found.miss is not None:
            self.near.append(
                f"{lm.name}, {cut}: row {start} fits, but row {start + found.miss.position} fits no token behind it"
            )
            return
        distances = torch.tensor([p.distance for p in found.positions])
        self._fit(seen, self._said_scale(scale), start, distances, torch.tensor([p.tolerance for p in found.positions]))

    def _unit_cut(self, cut: Cut) -> Cut:
        """Return the variant of a cut that brings rows to length 1, where all of these have it."""
        lengths = self._rows[self._rows.any(dim=1)].norm(dim=1)
        name = f"{cut.site}_unit"
        is_unit = bool(((lengths - 1).abs() < _UNIT).all())
        return Cut(cut.layer, next((site for site in SITES if site == name), cut.site)) if is_unit else cut

    def _said_scale(self, scale: float) -> float:
        return 1.0 if abs(scale - 1) < _EXACT_SCALE else scale

    def _observation(self, cut: Cut, scale: float, rows: range) -> Observation:
        """Return some rows at a cut, brought back to the model's scale; their rounding becomes a box around them."""
        scale = self._said_scale(scale)
        stored = self._stored[rows.start : rows.stop]
        coarse = None if self._half_step is None else self._half_step[rows.start : rows.stop]
        if scale == 1.0:
            return Observation(states=stored, layer=cut.layer, site=cut.site, half_step=coarse)
        states = (stored.double() / scale).float()
        box = torch.stack([self._blur(row) for row in rows]) / scale  # (N, W)
        # An error d of each coordinate, even within its box, moves the scale of row v by <d, v> / <v, v>.
        first, moved = states[0], box[0] / math.sqrt(3)
        error = _LUCK * float((moved * first).norm() / first.square().sum())
        return Observation(states=states, layer=cut.layer, site=cut.site, half_step=box + error * states.abs())

    def _fit(self, seen: Observation, scale: float, offset: int, distances: Tensor, tolerances: Tensor) -> None:
        worst = int((distances / tolerances.clamp(min=1e-30)).argmax())
        self.fits.append(
            Fit(
                model=self._lm.name,
                dtype=str(self._lm.dtype).removeprefix("torch."),
                layer=seen.layer,
                site=seen.site,
                scale=scale,
                offset=offset,
                columns=self._columns,
                distance=float(distances[worst]),
                tolerance=float(tolerances[worst]),
                rows=len(distances),
            )
        )
