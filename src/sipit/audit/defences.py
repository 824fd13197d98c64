"""What is done to states before they leave, and what an attacker who knows it, but not its draw, assumes.

Each defence takes the rows of one prompt and a strength and returns other rows with the attack's assumption: rows to
be inverted exactly (with the rounding they show), or a noise model to decode under. Shapes: T rows, W = their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.inversion import NoiseModel
from sipit.observations import Observation
from sipit.observations.rounding import as_rounded

_DELTA = 1e-5  # of (epsilon, delta)-differential privacy
_EXACT_BITS = 6  # from which a rounding leaves so much of a state that tokens are told apart exactly


@dataclass(frozen=True, kw_only=True, eq=False)
class Defended:
    """Rows as they leave, and what the attacker assumes of them."""

    seen: Observation
    noise: NoiseModel | None  # None: nothing but rounding, so they are inverted exactly
    is_shuffled: bool = False  # the attacker knows that the rows are out of order
    is_permuted: bool = False  # and that the columns are
    received: Observation | None = None  # what the rightful receiver makes of the rows with its key; None: just them


@dataclass(frozen=True, kw_only=True)
class Defence:
    """One defence."""

    name: str
    strength: str  # what the number means
    source: str
    apply: Callable[[Observation, float, torch.Generator], Defended]
    check: Callable[[float], bool]  # whether a strength is in range


def _none(seen: Observation, _: float, __: torch.Generator) -> Defended:
    return Defended(seen=seen, noise=None)


def _gaussian(seen: Observation, strength: float, generator: torch.Generator) -> Defended:
    sigma = strength * _usual_length(seen.states) / math.sqrt(seen.d_model)
    return _with_noise(seen, seen.states.double(), sigma, generator, longest=None)


def _dp_gaussian(seen: Observation, epsilon: float, generator: torch.Generator) -> Defended:
    """Clip rows to twice the usual length, which bounds what one token can change, and add noise for that."""
    longest = 2 * _usual_length(seen.states)
    rows = seen.states.double()
    rows = rows * (longest / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
    sigma = 2 * longest * math.sqrt(2 * math.log(1.25 / _DELTA)) / epsilon
    return _with_noise(seen, rows, sigma, generator, longest=longest)


def _with_noise(
    seen: Observation, rows: Tensor, sigma: float, generator: torch.Generator, *, longest: float | None
) -> Defended:
    noise = sigma * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    sent = (rows.cpu() + noise).to(seen.states.dtype)
    model = replace(NoiseModel.gaussian(sigma), longest=longest)
    return Defended(seen=replace(seen, states=sent, fingerprint=None), noise=model)


def _rounding(seen: Observation, bits: float, __: torch.Generator) -> Defended:
    levels = 2 ** (int(bits) - 1) - 1
    step = seen.states.double().abs().amax(dim=1, keepdim=True) / levels  # (T, 1)
    rows = ((seen.states.double() / step).round() * step).float()
    values, _, half_step = as_rounded(rows)
    sent = replace(seen, states=values, half_step=half_step, fingerprint=None)
    if bits >= _EXACT_BITS:
        return Defended(seen=sent, noise=None)
    plain = replace(seen, states=rows, fingerprint=None)
    return Defended(seen=plain, noise=NoiseModel.gaussian(float(step.median()) / math.sqrt(12)))


def _dropping(seen: Observation, share: float, generator: torch.Generator) -> Defended:
    """Set a share of the coordinates to 0, each value by a draw of its own."""
    kept = torch.rand(seen.states.shape, generator=generator) >= share
    rows = (seen.states.cpu() * kept).float()
    small = 1e-3 * _usual_length(seen.states) / math.sqrt(seen.d_model)
    model = replace(NoiseModel.gaussian(small), drops=True)
    return Defended(seen=replace(seen, states=rows, fingerprint=None), noise=model)


def _permuted_rows(seen: Observation, _: float, generator: torch.Generator) -> Defended:
    order = torch.randperm(seen.seq_len, generator=generator).tolist()
    sent = replace(seen.arranged(row_order=order), fingerprint=None)
    return Defended(seen=sent, noise=None, is_shuffled=True, received=seen)


def _permuted_columns(seen: Observation, _: float, generator: torch.Generator) -> Defended:
    order = torch.randperm(seen.d_model, generator=generator).tolist()
    sent = replace(seen.arranged(column_order=order), fingerprint=None)
    return Defended(seen=sent, noise=None, is_permuted=True, received=seen)


def _clipping(seen: Observation, most: float, _: torch.Generator) -> Defended:
    """Cut every value to some times the usual size of one; what was cut is only known to be that large or larger."""
    limit = most * _usual_length(seen.states) / math.sqrt(seen.d_model)
    rows = seen.states.float()
    is_cut = rows.abs() > limit
    longest = float(rows.abs().max())
    sent = torch.where(is_cut, rows.sign() * (limit + longest) / 2, rows)  # the middle of what it may have been
    steps = torch.where(is_cut, (longest - limit) / 2, 0.0).float()
    clipped = replace(seen, states=rows.clamp(-limit, limit), fingerprint=None)
    return Defended(seen=replace(seen, states=sent, half_step=steps, fingerprint=None), noise=None, received=clipped)


def _sharding(seen: Observation, n_parties: float, _: torch.Generator) -> Defended:
    """Give each party every n-th row; the attacker is the one that holds the last row."""
    n = int(n_parties)
    held = list(range((seen.seq_len - 1) % n, seen.seq_len, n))
    sent = replace(seen, states=seen.states[held], positions=tuple(held), fingerprint=None)
    return Defended(seen=sent, noise=None, received=seen)


def _usual_length(states: Tensor) -> float:
    """Return the median length of the rows behind the first one, which may be many times longer. (T, W)."""
    rows = states[1:] if len(states) > 1 else states
    return float(rows.double().norm(dim=1).median())


DEFENCES: dict[str, Defence] = {
    one.name: one
    for one in (
        Defence(
            name="none",
            strength="none",
            source="the states as they are; keeping k layers local is --layer k (a split-inference tool's own claim)",
            apply=_none,
            check=lambda x: x == 0,
        ),
        Defence(
            name="gaussian",
            strength="length of the noise over that of a state",
            source="noise on what leaves the client in split inference, as PIA (arXiv 2503.09022) attacks it",
            apply=_gaussian,
            check=lambda x: x > 0,
        ),
        Defence(
            name="dp-gaussian",
            strength=f"epsilon at delta {_DELTA:g}, for one token",
            source="Dwork and Roth 2014, The Algorithmic Foundations of Differential Privacy, theorem A.1",
            apply=_dp_gaussian,
            check=lambda x: x > 0,
        ),
        Defence(
            name="rounding",
            strength="bits a value, a scale a row",
            source="activation quantisation; von Strauss (arXiv 2511.14808) finds collisions at 4 bits",
            apply=_rounding,
            check=lambda x: x == int(x) and 2 <= x <= 16,
        ),
        Defence(
            name="dropping",
            strength="share of the values set to 0",
            source="dropout of what leaves the client; Srivastava et al. 2014 for the draw",
            apply=_dropping,
            check=lambda x: 0 < x < 1,
        ),
        Defence(
            name="clipping",
            strength="most that a value may be, over the usual size of one",
            source="bounded activations, as clipping before noise makes them; the attacker guesses the largest value",
            apply=_clipping,
            check=lambda x: x > 0,
        ),
        Defence(
            name="permute-rows",
            strength="nothing: every order is as likely",
            source="a bag of states, as Hidden No More (arXiv 2505.18332) attacks it",
            apply=_permuted_rows,
            check=lambda x: x == 0,
        ),
        Defence(
            name="permute-columns",
            strength="nothing: one secret permutation for all rows",
            source="permuted hidden dimensions, as Hidden No More (arXiv 2505.18332) attacks them",
            apply=_permuted_columns,
            check=lambda x: x == 0,
        ),
        Defence(
            name="sharding",
            strength="parties, each of which holds every n-th row",
            source="token sharding, as Cascade does it for split inference",
            apply=_sharding,
            check=lambda x: x == int(x) and 2 <= x <= 16,
        ),
    )
}


def defence_named(text: str) -> tuple[Defence, float]:
    """Return the defence and strength that NAME:STRENGTH, or "none", says.

    Raises:
        OptionError: there is no such defence, or the strength is not one of its own.
    """
    name, _, number = text.partition(":")
    if name not in DEFENCES:
        raise OptionError(f"defence {name!r} is unknown; choose one of {', '.join(DEFENCES)}, as NAME:STRENGTH")
    defence = DEFENCES[name]
    try:
        strength = float(number) if number else 0.0
    except ValueError:
        strength = math.nan
    if not defence.check(strength):
        raise OptionError(f"defence {text!r} has no strength it can work with; give {name}:NUMBER, {defence.strength}")
    return defence, strength
