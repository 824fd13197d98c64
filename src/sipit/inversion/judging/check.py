"""The packed check: candidates through the model, distances to the observed states. It alone decides.

Knows no proposals. Shapes: T observed positions, Q packed tokens, D = d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.float64 import has_float64
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise import SAFETY, local_noise, noise_floor
from sipit.inversion.judging.tolerance import Tolerance
from sipit.models import LanguageModel, PackedRow
from sipit.observations import Observation

_SPREAD_LESS = 4.0  # times less than nine in ten of the tokens seen in calibration


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The outcome of one packed pass."""

    token_ids: Tensor  # (Q,)
    states: Tensor  # (Q, D)
    distances: Tensor  # (Q,) L2 to the observed state at each token's position
    fits: Tensor  # (Q,) bool: within the tolerance there
    is_near: Tensor  # (Q,) bool: within the tolerance plus the declared noise

    def subset(self, columns: list[int]) -> Checked:
        """Return the outcome for some of the tokens."""
        return Checked(
            token_ids=self.token_ids[columns],
            states=self.states[columns],
            distances=self.distances[columns],
            fits=self.fits[columns],
            is_near=self.is_near[columns],
        )


class PackedCheck:
    """Judges candidates behind one accepted prefix, which grows as tokens are accepted.

    Args:
        lm: the model.
        seen: what was observed.
        tolerance: what counts as equal to it.
        meter: charged for every token run.
        noise: L2 distance declared by the caller.
        row: where the prefix is kept; it may hold those of other prompts.
        lane: this prompt's in the row.
    """

    def __init__(
        self,
        lm: LanguageModel,
        seen: Observation,
        tolerance: Tolerance,
        meter: Meter,
        *,
        noise: float,
        row: PackedRow,
        lane: int = 0,
    ) -> None:
        self.cut = lm.cut(seen.cut, seq_len=seen.n_positions)
        self.row = row
        self.lane = lane
        device = self.cut.device
        widest = torch.float64 if has_float64(device) else torch.float32
        wide = widest if torch.float64 in (lm.dtype, seen.states.dtype) else torch.float32
        self.observed = seen.states.to(device, wide)  # (T, D)
        self._seq_len = seen.n_positions
        self._tolerance = tolerance
        self._measured = noise_floor(lm, seen.cut, seen.n_positions)
        self._floor = tolerance.noise.to(device, widest, copy=True)  # (T,)
        self._limit = tolerance.total.to(device, widest, copy=True)  # (T,)
        self.noise = noise
        self._meter = meter

    def lanes(self, n: int) -> Tensor:
        """Return the lane of n packed tokens of this prompt. (n,)."""
        return torch.full((n,), self.lane)

    def limit(self, position: int) -> float:
        """Largest distance that arithmetic alone explains at a position."""
        return float(self._limit[position])

    def is_coarse(self, position: int) -> bool:
        """Whether the tolerance at a position is not clearly below the distance of wrong tokens."""
        return bool(self._tolerance.is_coarse[position])

    @property
    def is_independent(self) -> bool:
        """Whether a state depends on its own token alone, so that no later one tells more of it."""
        return self.cut.layer == 0

    def is_open(self, position: int) -> bool:
        """Whether the rounding of the stored values alone may let many tokens fit at a position."""
        return bool(self._tolerance.is_open[position])

    def alike_within(self, position: int) -> float:
        """Return how near embedding rows must lie for their states to be within the tolerance at a position.

        By how far the blocks were seen to spread rows apart, with room for tokens that they spread less.
        """
        floor = self._measured
        spread = floor.first_spread if position == 0 else floor.rest_spread
        return _SPREAD_LESS * self.limit(position) / max(spread, 1e-30)

    def run(self, token_ids: Tensor, positions: Tensor, attends: Tensor | None = None) -> Checked:
        """Run tokens behind the accepted prefix, and compare them. (Q,), (Q,), (Q, Q) bool: see `PackedRow.run`."""
        states = self.row.run(token_ids, positions, attends, lanes=self.lanes(len(token_ids)))
        return self.judge(token_ids, positions, states)

    def judge(self, token_ids: Tensor, positions: Tensor, states: Tensor) -> Checked:
        """Compare the states of packed tokens with the observed ones. (Q,), (Q,), (Q, D)."""
        self._meter.spend(len(token_ids), self.cut.layer)
        self._meter.n_checked += len(token_ids)
        return self.compared(token_ids, positions, states)

    def compared(self, token_ids: Tensor, positions: Tensor, states: Tensor) -> Checked:
        """Compare states with the observed ones, for which no pass of this search was made. (Q,), (Q,), (Q, D)."""
        states = states.to(self.observed.dtype)
        rows = positions.to(states.device)
        observed = self.observed[rows]  # (Q, D)
        distances = self._tolerance.distances(states, observed, rows)  # (Q,)
        excess = self._tolerance.excess(states, observed, rows)  # (Q,)
        floor = self._floor[rows]
        return Checked(
            token_ids=token_ids,
            states=states,
            distances=distances,
            fits=excess <= floor,  # which the plain distance follows: see `replay`
            is_near=excess <= floor + self.noise,
        )

    def remeasure(self, prefix: Sequence[int], token_id: int) -> None:
        """Measure the noise of this very token's state, and raise the tolerance here to what it explains.

        The row must hold the whole prefix, and nothing that is still to be kept lies behind it.
        """
        place = len(prefix)
        ids = torch.tensor(prefix, dtype=torch.long)
        noise, spent = local_noise(self.cut, ids, token_id, seq_len=self._seq_len, row=self.row, lane=self.lane)
        self._meter.spend(spent, self.cut.layer)
        more = max(0.0, SAFETY * noise - float(self._floor[place]))
        self._floor[place] += more
        self._limit[place] += more

    def own_limit(self, prefix: Sequence[int], token_id: int) -> float:
        """Return the largest distance that the measured noise of this very token's state explains."""
        ids = torch.tensor(prefix, dtype=torch.long)
        noise, spent = local_noise(self.cut, ids, token_id, seq_len=self._seq_len)
        self._meter.spend(spent, self.cut.layer)
        return SAFETY * noise
