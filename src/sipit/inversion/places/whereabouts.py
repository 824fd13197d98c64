"""Where among all states of known prompts some rows lie: any layer, site, position and scale.

For telling what rows are instead of what they should be. It compares directions, so a scale plays no part;
what it names is a likeness, and whoever reports it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.models import LanguageModel
from sipit.models.everywhere import distinct_cuts, everywhere
from sipit.models.sites import SITES
from sipit.observations import Cut

_NEAR = 0.05  # of its length that a row may lie from a state and still be called that state


@dataclass(frozen=True, kw_only=True)
class Place:
    """A state that a row is, but for a scale."""

    cut: Cut
    position: int
    scale: float  # the row is this many times the state
    apart: float  # L2 distance of the row to the scaled state, over the row's length
    is_update: bool = False  # whether it is what the last block adds to the residual stream, without that stream

    def __str__(self) -> str:
        what = f"{self.cut}, position {self.position}"
        if self.is_update:
            what = f"what block {self.cut.layer - 1} adds at position {self.position}, without the residual stream"
        return what if abs(self.scale - 1) < 1e-3 else f"{what}, times {self.scale:.4g}"


def places_of(
    lm: LanguageModel, rows: Tensor, input_ids: Tensor, *, cuts: Sequence[Cut] | None = None, near: float = _NEAR
) -> list[Place | None]:
    """Return for each row the state of one prompt that it lies nearest to; None where none is near.

    Args:
        lm: the model.
        rows: (N, W), none of them zero.
        input_ids: the prompt. (T,)
        cuts: where to look; None: at every layer and site that is as wide.
        near: how far a row may lie from a state, over its length.
    """
    rows = rows.float().cpu()
    found: list[Place | None] = [None] * len(rows)
    where = distinct_cuts(lm, int(rows.shape[1])) if cuts is None else list(cuts)
    for cut, states, is_update in _states_and_updates(lm, input_ids, where):
        for row, position, scale, apart in _nearest(rows, states):
            before = found[row]
            if apart < near and (before is None or apart < before.apart):
                found[row] = Place(cut=cut, position=position, scale=scale, apart=apart, is_update=is_update)
    return found


def _states_and_updates(
    lm: LanguageModel, input_ids: Tensor, cuts: Sequence[Cut]
) -> Iterator[tuple[Cut, Tensor, bool]]:
    before: tuple[Cut, Tensor] | None = None
    with torch.no_grad():
        for cut, values in everywhere(lm, input_ids[None], cuts, seq_len=len(input_ids)):
            states = values[0].float().cpu()  # (T, W)
            yield cut, states, False
            if before is not None and SITES[cut.site].ends == "block" and before[0] == Cut(cut.layer - 1, cut.site):
                yield cut, states - before[1], True
            before = (cut, states)


def _nearest(rows: Tensor, states: Tensor) -> Iterator[tuple[int, int, float, float]]:
    """Yield for each row the position whose state points most nearly its way, the scale and the distance left."""
    lengths, norms = rows.norm(dim=1), states.norm(dim=1)
    cosines = (rows / lengths.clamp(min=1e-30)[:, None]) @ (states / norms.clamp(min=1e-30)[:, None]).T  # (N, T)
    for row, position in enumerate(cosines.argmax(dim=1).tolist()):
        state = states[position].double()
        square = float(state.square().sum())
        scale = float(rows[row].double() @ state) / square if square else 0.0
        if scale <= 0 or not float(lengths[row]):
            yield row, position, 0.0, math.inf
            continue
        apart = float((rows[row].double() - scale * state).norm()) / float(lengths[row])
        yield row, position, scale, apart
