"""Whether what is left of the rows looks like the noise it is said to be.

Noise that is large enough explains any rows by any prompt. What tells a right prompt is that nothing of the states is
left over: the residuals are as large at every position as the noise model says, no larger along the directions in
which tokens differ than along others, and the states account in full for how the rows differ from those of other
tokens. Any of a wrong model, layer or prompt leaves its own states in the residuals. Shapes: T rows, D = their width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.judging.directions import SHARES, Along, directions
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.models import LanguageModel
from sipit.observations import Observation

PROBABLE = 0.95  # posterior of a prompt from which it is called probable
_OTHERS = 8  # random tokens run at each position beside the claimed one
_MOST_DEVIATION = 5.0  # standard deviations that a sum of squares may be off: by chance 1 in a million, of 500
_LEAST_SLOPE_SIGNAL = 16.0  # standard deviations of the slope below 1: less tells no prompt from none
_CHUNK = 256  # tokens in one packed pass
_MOST_ALONG = 4.0  # standard deviations that a row may leave along any of them: by chance 3 in 100,000
_MOST_ALL_ALONG = 3.0  # the same of all rows, for words that fit as well as the right ones leave little: 1 in 700
_MOST_IN_COMMON = 3.0  # standard deviations that their mean may leave too much: the same
_MOST_IN_A_RUN = 4.0  # that rows one after the other may be larger than all others: by chance 1 in 500, of 20 rows


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """What is left of the rows once the states of a prompt are taken away, in standard deviations of such noise."""

    sigma: float  # root mean square of the residuals over the coordinates
    rows: float  # deviation of the row whose energy is furthest from what the noise model says
    directions: float  # deviation of the energy along the main directions in which tokens differ
    row_along: float  # of the row that leaves most along sets of such directions: its largest deviation there
    all_along: float  # largest deviation of all rows there
    in_common: float  # deviation of what rows leave in their mean: noise is new in each
    in_a_run: float  # of the size of rows one after the other from that of all others: its largest deviation
    slope: float  # share of the rows' distance from other tokens' states that the prompt's states account for: 1
    slope_error: float  # its standard deviation
    gap: float  # root mean square distance of other tokens' states
    reasons: tuple[str, ...]  # why they are not what the model says; empty where they are
    doubts: tuple[str, ...]  # what else speaks for a token that was missed: of a prompt that is said to be sure

    @property
    def is_noise(self) -> bool:
        """Whether the residuals look like the noise, and the prompt's states account for the rest."""
        return not self.reasons

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self)

    @property
    def allow_probable(self) -> bool:
        """Whether they also rule out that a token is another, near one."""
        return self.is_noise and not self.doubts


def residuals_of(lm: LanguageModel, seen: Observation, input_ids: Tensor, noise: NoiseModel, meter: Meter) -> Residuals:
    """Compare the rows of a prompt with its states under a noise model.

    Args:
        lm: the model.
        seen: the rows, complete behind their known prefix.
        input_ids: the whole prompt, known prefix included: (P + T,).
        noise: the model.
        meter: charged for every token run.
    """
    states, others = _with_others(lm, seen, input_ids, meter)  # (T, D), (T, M, D)
    observed = as_float64(seen.states).to(states.device)
    kept = noise.kept(observed)  # (T, D)
    error = (observed - noise.expected(states)) * kept
    spread = noise.variances(observed.shape[1]).to(states.device).sqrt() * abs(noise.scale)
    z = error / spread  # (T, D)
    excess = _kurtosis(noise)
    counts = kept.sum(dim=1).clamp(min=1).double()  # (T,)
    by_row = (z.square().sum(dim=1) - counts) / (counts * excess).sqrt()  # (T,)
    apart = (others - states[:, None]) * kept[:, None] / spread  # (T, M, D)
    sets = directions(apart.flatten(0, 1), SHARES)  # (D, K) each
    along = [Along.of(z, kept, each) for each in sets]
    n_along = max(sets[0].shape[1] * len(z), 1)
    by_direction = (float(along[0].energy.sum()) - n_along) / math.sqrt(2 * n_along)
    rows_along = torch.stack([each.deviations() for each in along]).amax(dim=0)  # (T,)
    all_along = max(float(each.in_all().deviations()) for each in along)
    slope, slope_error = _slope(z, noise.scale * apart)
    in_common, in_a_run = _in_common(z, kept), _in_a_run(z, counts, excess)
    worst = float(by_row[by_row.abs().argmax()])
    gaps = (others - states[:, None]).square().sum(dim=2).mean().sqrt()
    return Residuals(
        sigma=float((error.square().sum() / counts.sum()).sqrt()),
        rows=worst,
        directions=by_direction,
        row_along=float(rows_along.max()),
        all_along=all_along,
        in_common=in_common,
        in_a_run=in_a_run,
        slope=slope,
        slope_error=slope_error,
        gap=float(gaps),
        reasons=_reasons(seen, by_row, by_direction, slope, slope_error),
        doubts=_doubts(seen, rows_along, all_along, in_common, in_a_run),
    )


def _reasons(
    seen: Observation, by_row: Tensor, by_direction: float, slope: float, slope_error: float
) -> tuple[str, ...]:
    found = []
    worst = int(by_row.abs().argmax())
    # Each comparison asks for what holds, so that values that are no numbers give a reason.
    if not abs(float(by_row[worst])) <= _MOST_DEVIATION:
        found.append(
            f"row {seen.positions[worst]} is {float(by_row[worst]):.3g} standard deviations off the size that the "
            "noise has elsewhere"
        )
    if not abs(by_direction) <= _MOST_DEVIATION:
        found.append(
            f"along the directions in which tokens differ, more is left than noise explains: {by_direction:.3g} "
            "standard deviations"
        )
    if not abs(slope - 1) <= _MOST_DEVIATION * slope_error + 0.05:
        found.append(f"the states account for {slope:.2f} of how the rows differ from those of other tokens, not for 1")
    if not slope_error * _LEAST_SLOPE_SIGNAL <= 1:
        found.append("the noise hides the states, so the rows say nothing of the tokens")
    return tuple(found)


def _in_common(z: Tensor, kept: Tensor) -> float:
    """Return how many standard deviations the energy of the mean row lies above that of noise. (T, D), (T, D)."""
    counts = kept.to(z).sum(dim=0)  # (D,) rows that keep each coordinate
    usual = z.square().sum() / counts.sum().clamp(min=1)
    energy = (z.sum(dim=0).square() / counts.clamp(min=1)).sum() / usual.clamp(min=1e-300)
    n = (counts > 0).to(z).sum().clamp(min=1)
    return float(Along(energy=energy, mean=n, half_variance=n).deviations())


def _in_a_run(z: Tensor, counts: Tensor, excess: float) -> float:
    """Return how many standard deviations the energy of rows one after the other lies above that of all others.

    Of runs of 2, 4, 8 rows and so on, and of half of them, the one that lies highest; by Paulson's (1942) normal law of
    the ratio of two chi-squares. (T, D), (T,).
    """
    n_rows, best = len(z), -math.inf
    energy = z.square().sum(dim=1).cumsum(dim=0)  # (T,)
    freedom = counts.cumsum(dim=0) * 2 / excess  # (T,)
    lengths = {2**power for power in range(1, n_rows.bit_length())} | {n_rows // 2}
    for length in (each for each in lengths if 2 <= each <= n_rows // 2):
        inside, free = (total[length - 1 :].clone() for total in (energy, freedom))  # (T - L + 1,)
        inside[1:] -= energy[:-length]
        free[1:] -= freedom[:-length]
        ratio = (inside / free) / ((energy[-1] - inside) / (freedom[-1] - free)).clamp(min=1e-300)
        own, other = 2 / (9 * free), 2 / (9 * (freedom[-1] - free))
        root = ratio.pow(1 / 3)
        best = max(best, float((((1 - other) * root - (1 - own)) / (other * root.square() + own).sqrt()).max()))
    return best if math.isfinite(best) else 0.0


def _doubts(seen: Observation, by_row: Tensor, in_all: float, in_common: float, in_a_run: float) -> tuple[str, ...]:
    worst, found = int(by_row.argmax()), []
    if not float(by_row[worst]) <= _MOST_ALONG:
        found.append(
            f"row {seen.positions[worst]} leaves more along the directions in which tokens differ than noise explains "
            f"({float(by_row[worst]):.3g} standard deviations), as a token leaves in whose place another was read"
        )
    if not in_all <= _MOST_ALL_ALONG:
        found.append(
            "all rows together leave more along the directions in which tokens differ than noise explains "
            f"({in_all:.3g} standard deviations), as after tokens that were missed"
        )
    if not in_common <= _MOST_IN_COMMON:
        found.append(
            f"what is left of the rows is alike by {in_common:.3g} standard deviations more than noise is: they are of "
            "another layer or model, or one vector was added to all"
        )
    if not in_a_run <= _MOST_IN_A_RUN:
        found.append(
            f"rows one after the other are off by more than all others are ({in_a_run:.3g} standard deviations), so "
            "they are of another prompt, or have another noise"
        )
    return tuple(found)


def _with_others(lm: LanguageModel, seen: Observation, input_ids: Tensor, meter: Meter) -> tuple[Tensor, Tensor]:
    """Return the states of a prompt, and those of random tokens in place of each. (T, D), (T, M, D) float64."""
    model = lm.cut(seen.cut, seq_len=len(input_ids))
    first = len(seen.known_prefix)
    n_rows = len(input_ids) - first
    states = as_float64(model.ordinary(input_ids)[first:])
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(lm.vocab_size, (n_rows, _OTHERS), generator=generator)
    row = model.row(input_ids)
    places = torch.arange(first, len(input_ids)).repeat_interleave(_OTHERS)
    continues = torch.arange(len(input_ids))[None] < places[:, None]  # (T · M, P + T)
    parts = torch.arange(len(places)).split(_CHUNK)
    rows = [row.run(tokens.flatten()[i], places[i], continues=continues[i]) for i in parts]
    meter.spend(2 * len(input_ids) + len(places), model.layer)
    return states, as_float64(torch.cat(rows)).view(n_rows, _OTHERS, -1)


def _slope(z: Tensor, others: Tensor) -> tuple[float, float]:
    """Return the slope of rows on states, both less other tokens' states, and its error. (T, D), (T, M, D)."""
    mean = others.mean(dim=1)  # (T, D) from the claimed state to the mean other one
    energy = float(mean.square().sum())
    return 1 - float((z * mean).sum()) / max(energy, 1e-300), 1 / math.sqrt(max(energy, 1e-300))


def _kurtosis(noise: NoiseModel) -> float:
    """Return the variance of a squared error over the square of its variance."""
    return 0.8 if noise.law == "uniform" else 2.0
