"""What rows still say of states that a secret linear map was applied to: which candidates agree with them.

Neither map needs to be found. A rotation leaves all inner products of rows as they were; mixing rows with one another
leaves the space that they span. Both are compared with the states of the tokens accepted so far and of a candidate.
Shapes: R rows of width W as observed, T states, N candidates.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.inversion.judging.noise import SAFETY, noise_floor
from sipit.models import LanguageModel
from sipit.observations import Observation

_ROUNDINGS = 8.0  # units in the last place that applying the map may have moved each value by


class Relation(Protocol):
    """What rows say of the states of a prompt."""

    def excess(self, states: Tensor, accepted: Tensor) -> Tensor:
        """Return how far each candidate's state is from what the rows say, over what arithmetic explains.

        (N, W) states at one position, (T, W) those before it, float64 → (N,); 1 or less agrees.
        """


class UpToRotation:
    """Rows that were multiplied by one secret orthogonal matrix, in their order: their inner products are known.

    A candidate's distance is the least that any rotation leaves which fits the rows before it.
    """

    def __init__(self, lm: LanguageModel, seen: Observation) -> None:
        rows = seen.states.cpu().double()
        self._norms = rows.norm(dim=1)  # (R,)
        self._axes = rows @ _in_turn(rows)  # (R, R) each row along those before it, and what is left of it
        self._first, self._rest = _allowed(lm, seen)

    def excess(self, states: Tensor, accepted: Tensor) -> Tensor:
        """As `Relation.excess`."""
        place = len(accepted)
        basis = _in_turn(accepted)  # (W, T)
        along = states @ basis  # (N, T)
        own = (states - along @ basis.T).norm(dim=1)  # (N,)
        gap = torch.cat([along - self._axes[place, :place], (own - self._axes[place, place])[:, None]], dim=1)
        allowed = (self._rest if place else self._first) * float(self._norms[place])
        found: Tensor = gap.norm(dim=1) / allowed
        return found


class InSpan:
    """Rows that are unknown mixtures of the states, of more rows perhaps, in no order: their span is known.

    A state that those before it span already agrees only where the rows themselves are not independent: one token
    repeated, with rotary positions, leaves one state.

    Raises:
        OptionError: there are as many rows as they are wide, so that they span everything and say nothing.
    """

    def __init__(self, lm: LanguageModel, seen: Observation) -> None:
        rows = seen.states.cpu().double()
        if len(rows) >= rows.shape[1]:
            raise OptionError(
                f"{len(rows)} mixed rows of width {rows.shape[1]} span all states, so nothing of a prompt is left in "
                "them; give fewer rows than they are wide"
            )
        self._error = _ROUNDINGS * torch.finfo(seen.states.dtype).eps * float(rows.norm()) / len(rows) ** 0.5
        turned, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
        rank = int((sizes > self._error).sum())
        self._basis = basis[:rank]  # (r, W)
        self._gains = (turned / sizes)[:, :rank].norm(dim=0)  # (r,) of an error of the rows, along each direction
        self._has_repeats = rank < len(rows)
        self._first, self._rest = _allowed(lm, seen)

    def excess(self, states: Tensor, accepted: Tensor) -> Tensor:
        """As `Relation.excess`."""
        along = states @ self._basis.T  # (N, R)
        left = (states - along @ self._basis).norm(dim=1)
        allowed = (self._rest if len(accepted) else self._first) * states.norm(dim=1)
        allowed = allowed + (along * self._gains).norm(dim=1) * self._error
        found: Tensor = left / allowed
        if len(accepted) and not self._has_repeats:
            known = _in_turn(accepted)  # (W, T)
            is_old = (states - states @ known @ known.T).norm(dim=1) <= allowed
            found = found.masked_fill(is_old, torch.inf)
        return found


def _in_turn(rows: Tensor) -> Tensor:
    """Return the direction of what each row adds to those before it, orthonormal. (R, W) → (W, R)."""
    basis = torch.linalg.qr(rows.T).Q
    found: Tensor = basis * (basis * rows.T).sum(dim=0).sign()
    return found


def _allowed(lm: LanguageModel, seen: Observation) -> tuple[float, float]:
    """Return what arithmetic may move a state by, over its norm: at the first position, and later."""
    floor = noise_floor(lm, seen.cut)
    applied = _ROUNDINGS * torch.finfo(seen.states.dtype).eps
    return SAFETY * floor.first + applied, SAFETY * floor.rest + applied
