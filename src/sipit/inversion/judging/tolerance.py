"""How far a right candidate may lie from the observed state.

By (a) the order of floating-point sums, which `noise` measures, and (b) the rounding to the dtype the
states were stored in, which is bounded exactly from the stored values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.judging.differences import coordinate_shares
from sipit.inversion.judging.noise import CLEAR, SAFETY, noise_floor
from sipit.models import LanguageModel
from sipit.observations import Observation
from sipit.observations.rounding import as_rounded

_LUCK = 1e-3  # chance that a box may hold a wrong token's state before it counts as coarse
_COARSE = 0.02  # of the gap to wrong tokens, above which a later position's tolerance is coarse


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What counts as equal to one observation's states, position by position."""

    noise: Tensor  # (T,) float64: explained by the order of sums
    is_coarse: Tensor  # (T,) bool: not clearly below the gap to wrong tokens, so that one may fit as well
    half_step: Tensor | None  # (T, D): most that rounding moved each stored value, inf: not held; None: not rounded
    is_partial: bool  # whether some values are not held
    is_open: Tensor  # (T,) bool: the rounding alone may let many other tokens fit
    total: Tensor  # (T,) float64: noise plus the norm of half_step

    def at(self, positions: Sequence[int]) -> Tolerance:
        """Return the tolerance of a prompt whose rows lie at some positions; 0 at those between, of which none is held.

        (T,) rows → (P,) positions.
        """
        n_positions = positions[-1] + 1
        if len(positions) == n_positions:
            return self
        rows = torch.tensor(list(positions))

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(n_positions, *values.shape[1:]).index_copy(0, rows.to(values.device), values)

        return Tolerance(
            noise=spread(self.noise),
            is_coarse=spread(self.is_coarse),
            half_step=None if self.half_step is None else spread(self.half_step),
            is_partial=self.is_partial,
            is_open=spread(self.is_open),
            total=spread(self.total),
        )

    def distances(self, states: Tensor, observed: Tensor, rows: Tensor) -> Tensor:
        """Return the L2 distance of states from the observed values, over those that are held.

        (N, D), (N, D), (N,) → (N,).
        """
        gap = states - observed
        if self.is_partial and self.half_step is not None:
            gap = gap.masked_fill(self.half_step[rows.to(self.half_step.device)].isinf().to(gap.device), 0.0)
        length: Tensor = torch.linalg.vector_norm(gap, dim=1)
        return length

    def excess(self, states: Tensor, observed: Tensor, rows: Tensor) -> Tensor:
        """Return how far states lie from all values that would be stored as the observed ones.

        (N, D), (N, D), (N,) → (N,). Rounding a massive coordinate widens the plain distance by much;
        this leaves the other coordinates their full say.
        """
        gap = (states - observed).abs_()
        if self.half_step is not None:
            gap = (gap - self.half_step[rows.to(self.half_step.device)].to(gap)).clamp_(min=0)
        length: Tensor = torch.linalg.vector_norm(gap, dim=1)
        return length


def tolerance_for(lm: LanguageModel, seen: Observation) -> Tolerance:
    """Return the tolerance at each position of an observation, on the CPU."""
    floor = noise_floor(lm, seen.cut, seen.n_positions)
    values = seen.states.cpu()  # (T, D)
    half = None if seen.half_step is None else seen.half_step.cpu()  # (T, D)
    held = values.double()
    if seen.is_partial and half is not None:
        held = held.masked_fill(half.isinf(), 0.0)
    norms = held.norm(dim=1)  # (T,)
    first, rest = _allowed(floor.first, floor.first_gap), _allowed(floor.rest, floor.rest_gap)
    ratios = torch.full_like(norms, rest)
    if seen.positions[0] == 0:
        ratios[0] = first
    is_coarse = torch.full_like(norms, rest > _COARSE * floor.rest_gap, dtype=torch.bool)
    if seen.positions[0] == 0:
        is_coarse[0] = first > CLEAR * floor.first_gap
    noise = ratios * norms
    stored = values  # (T, D)
    if half is None and seen.layer:  # rows of an embedding are the model's own, however it holds them
        stored, _, half = as_rounded(values)
    if torch.finfo(stored.dtype).eps > torch.finfo(lm.dtype).eps:
        half = half_ulp(stored) if half is None else half + half_ulp(stored)
    if half is None:
        return Tolerance(
            noise=noise,
            is_coarse=is_coarse,
            half_step=None,
            is_partial=False,
            is_open=torch.zeros_like(is_coarse),
            total=noise,
        )
    gaps = torch.full_like(norms, floor.rest_gap)
    if seen.positions[0] == 0:
        gaps[0] = floor.first_gap
    n_held = half.isfinite().sum(dim=1, keepdim=True)  # (T, 1)
    box = half + noise[:, None] / n_held.sqrt()  # (T, D) float64
    is_open = _may_hold_others(_middle(box), gaps * norms, lm.vocab_size)
    later = is_open & (torch.tensor(seen.positions) > 0)
    if later.any():  # look closer: the box may be narrow along coordinates in which other tokens' states differ
        shares = coordinate_shares(lm, seen.cut, seen.n_positions)
        is_open[later] = _may_hold_others(box[later] / shares, (gaps * norms)[later], lm.vocab_size)
    total = noise + half.double().masked_fill(half.isinf(), 0.0).norm(dim=1)
    return Tolerance(
        noise=noise,
        is_coarse=is_coarse | is_open,
        half_step=half,
        is_partial=seen.is_partial,
        is_open=is_open,
        total=total,
    )


def _middle(half_step: Tensor) -> Tensor:
    """Return boxes whose width is the median one along every coordinate: few coordinates are massive. (T, D)."""
    held = half_step.double().masked_fill(half_step.isinf(), torch.nan)
    return held.nanmedian(dim=1, keepdim=True).values.expand_as(held).where(~held.isnan(), torch.inf)


def _may_hold_others(half_step: Tensor, gaps: Tensor, vocab_size: int) -> Tensor:
    """Return at which positions the box of a rounding may hold a wrong token's state too. (T, D), (T,) → (T,).

    A state a gap d away is off by d / sqrt(D) a coordinate, which a box of half-width h holds with probability
    erf(h sqrt(D / 2) / d), if errors are about normal; it must hold all D of them, for one of V tokens. The box counts
    as twice as wide, since they are only about normal. Values that are not held, of infinite width, have no say.
    """
    n_held = half_step.isfinite().sum(dim=1, keepdim=True)  # (T, 1)
    held = torch.erf(2 * half_step.double() * n_held.sqrt() / (math.sqrt(2) * gaps.clamp(min=1e-300)[:, None]))
    return held.log().sum(dim=1) + math.log(vocab_size) > math.log(_LUCK)


def _allowed(noise: float, gap: float) -> float:
    """Return the tolerance for a measured noise and gap, all over the state's norm.

    The safety factor, as far as wrong tokens leave room for it: where noise is not far below their
    distance (a model in bfloat16), it stops half-way between the two, by ratio.
    """
    wide = SAFETY * noise
    return wide if wide <= CLEAR * gap else min(wide, max(2 * noise, math.sqrt(noise * gap)))


def half_ulp(values: Tensor) -> Tensor:
    """Return half a unit in the last place of each value: the largest error of rounding to its dtype.

    Any shape; float32 out. Exact for normal and subnormal numbers.
    """
    info = torch.finfo(values.dtype)
    _, exponent = torch.frexp(values.abs().double().clamp_(min=info.tiny))  # |x| = m 2^e, m in [0.5, 1)
    return torch.ldexp(torch.full_like(exponent, info.eps / 4, dtype=torch.float64), exponent)
