"""What is done to states before they leave, and what an attacker who knows it, but not its draw, assumes.

Each defence takes the rows of one prompt and a strength and returns other rows with the attack's assumption: rows to
be inverted exactly (with the rounding they show), a noise model to decode under, or what a secret map leaves as it was.
Shapes: T rows, W = their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.audit.fisher import fisher_diagonal
from sipit.errors import OptionError
from sipit.inversion import NoiseModel
from sipit.inversion.secrets import InSpan, Relation, UpToRotation
from sipit.models import LanguageModel
from sipit.observations import Observation
from sipit.observations.rounding import as_rounded

_DELTA = 1e-5  # of (epsilon, delta)-differential privacy
_SHIELD = 4.0  # times the usual length of a state that a shield vector has: GELO's are of high energy
_EXACT_BITS = 6  # from which a rounding leaves so much of a state that tokens are told apart exactly


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """What a defence is given."""

    lm: LanguageModel
    seen: Observation
    generator: torch.Generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Defended:
    """Rows as they leave, and what the attacker assumes of them."""

    seen: Observation
    noise: NoiseModel | None = None  # None: nothing but rounding, so they are inverted exactly
    relation: Relation | None = None  # what a secret linear map left of them, where there was one
    is_shuffled: bool = False  # the attacker knows that the rows are out of order
    is_permuted: bool = False  # and that the columns are
    received: Observation | None = None  # what the rightful receiver makes of the rows with its key; None: just them


@dataclass(frozen=True, kw_only=True)
class Defence:
    """One defence."""

    name: str
    strength: str  # what the number means
    source: str
    apply: Callable[[Scene, float], Defended]
    check: Callable[[float], bool]  # whether a strength is in range


def _none(scene: Scene, _: float) -> Defended:
    return Defended(seen=scene.seen)


def _gaussian(scene: Scene, strength: float) -> Defended:
    seen = scene.seen
    sigma = strength * _usual_length(seen.states) / math.sqrt(seen.d_model)
    return _with_noise(scene, seen.states.double(), NoiseModel.gaussian(sigma))


def _dp_gaussian(scene: Scene, epsilon: float) -> Defended:
    """Clip rows to twice the usual length, which bounds what one token can change, and add noise for that."""
    seen = scene.seen
    longest = 2 * _usual_length(seen.states)
    rows = seen.states.double()
    rows = rows * (longest / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
    sigma = 2 * longest * math.sqrt(2 * math.log(1.25 / _DELTA)) / epsilon
    return _with_noise(scene, rows, replace(NoiseModel.gaussian(sigma), longest=longest))


def _inverse_fisher(scene: Scene, nats: float) -> Defended:
    """Add noise to each coordinate by how little it matters: its share of a KL divergence, to first order."""
    fisher = fisher_diagonal(scene.lm, scene.seen.cut)  # (W,)
    spread = (2 * nats / (len(fisher) * fisher)).sqrt()
    return _with_noise(scene, scene.seen.states.double(), NoiseModel.gaussian(spread))


def _with_noise(scene: Scene, rows: Tensor, model: NoiseModel) -> Defended:
    """Add normal noise as a model says. (T, W)."""
    seen = scene.seen
    noise = model.spread * torch.randn(rows.shape, generator=scene.generator, dtype=torch.float64)
    sent = (rows.cpu() + noise).to(seen.states.dtype)
    return Defended(seen=replace(seen, states=sent, fingerprint=None), noise=model)


def _rounding(scene: Scene, bits: float) -> Defended:
    seen = scene.seen
    levels = 2 ** (int(bits) - 1) - 1
    step = seen.states.double().abs().amax(dim=1, keepdim=True) / levels  # (T, 1)
    rows = ((seen.states.double() / step).round() * step).float()
    values, _, half_step = as_rounded(rows)
    sent = replace(seen, states=values, half_step=half_step, fingerprint=None)
    if bits >= _EXACT_BITS:
        return Defended(seen=sent)
    plain = replace(seen, states=rows, fingerprint=None)
    return Defended(seen=plain, noise=NoiseModel.gaussian(float(step.median()) / math.sqrt(12)))


def _dropping(scene: Scene, share: float) -> Defended:
    """Set a share of the coordinates to 0, each value by a draw of its own."""
    seen = scene.seen
    kept = torch.rand(seen.states.shape, generator=scene.generator) >= share
    kept[:, 0] |= ~kept.any(dim=1)
    rows = seen.states.cpu() * kept
    unknown = torch.where(kept, 0.0, torch.inf)
    known = replace(seen, states=rows, half_step=unknown, fingerprint=None)
    return Defended(seen=known, received=replace(seen, states=rows, fingerprint=None))


def _permuted_rows(scene: Scene, _: float) -> Defended:
    seen = scene.seen
    order = torch.randperm(seen.seq_len, generator=scene.generator).tolist()
    sent = replace(seen.arranged(row_order=order), fingerprint=None)
    return Defended(seen=sent, is_shuffled=True, received=seen)


def _permuted_columns(scene: Scene, _: float) -> Defended:
    seen = scene.seen
    order = torch.randperm(seen.d_model, generator=scene.generator).tolist()
    sent = replace(seen.arranged(column_order=order), fingerprint=None)
    return Defended(seen=sent, is_permuted=True, received=seen)


def _rotation(scene: Scene, _: float) -> Defended:
    """Multiply all rows by one secret orthogonal matrix."""
    seen = scene.seen
    drawn = torch.randn(seen.d_model, seen.d_model, generator=scene.generator, dtype=torch.float64)
    turned = (seen.states.cpu().double() @ torch.linalg.qr(drawn).Q).to(seen.states.dtype)
    sent = replace(seen, states=turned, fingerprint=None)
    return Defended(seen=sent, relation=UpToRotation(scene.lm, sent), received=seen)


def _mixing(scene: Scene, n_shields: float) -> Defended:
    """Mix the rows, and some rows of random values four times as long, by one secret matrix."""
    seen, generator = scene.seen, scene.generator
    rows = seen.states.cpu().double()
    shields = torch.randn(int(n_shields), rows.shape[1], generator=generator, dtype=torch.float64)
    shields *= _SHIELD * _usual_length(rows) / math.sqrt(rows.shape[1])
    both = torch.cat([rows, shields])
    mixed = torch.randn(len(both), len(both), generator=generator, dtype=torch.float64) @ both
    sent = replace(seen, states=mixed.to(seen.states.dtype), positions=(), fingerprint=None)
    return Defended(seen=sent, relation=InSpan(scene.lm, sent), received=seen)


def _clipping(scene: Scene, most: float) -> Defended:
    """Cut every value to some times the usual size of one; those that were cut count as not held."""
    seen = scene.seen
    limit = most * _usual_length(seen.states) / math.sqrt(seen.d_model)
    rows = seen.states.float()
    clipped = replace(seen, states=rows.clamp(-limit, limit), fingerprint=None)
    is_cut = rows.abs() > limit
    unknown = torch.where(is_cut, torch.inf, 0.0)
    unknown[is_cut.all(dim=1), 0] = float(rows.abs().max())  # of a row cut everywhere one is held, in the widest box
    return Defended(seen=replace(clipped, half_step=unknown), received=clipped)


def _sharding(scene: Scene, n_parties: float) -> Defended:
    """Give each party every n-th row; the attacker is the one that holds the last row."""
    seen = scene.seen
    n = int(n_parties)
    held = list(range((seen.seq_len - 1) % n, seen.seq_len, n))
    sent = replace(seen, states=seen.states[held], positions=tuple(held), fingerprint=None)
    return Defended(seen=sent, received=seen)


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
            source="bounded activations, as clipping before noise makes them",
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
            name="rotation",
            strength="nothing: one secret orthogonal matrix for all rows",
            source="one secret rotation of what leaves; inner products stay, and the prompt is followed by them",
            apply=_rotation,
            check=lambda x: x == 0,
        ),
        Defence(
            name="mixing",
            strength="random shield vectors mixed in",
            source="a fresh secret mixture of the rows, as GELO makes (arXiv 2603.05035); their span stays as it was",
            apply=_mixing,
            check=lambda x: x == int(x) and 0 <= x <= 256,
        ),
        Defence(
            name="inverse-fisher",
            strength="nats a token that it may cost, to first order",
            source="the diagonal release of Hidden-State Privacy Has an Empty Middle (arXiv 2605.24042)",
            apply=_inverse_fisher,
            check=lambda x: x > 0,
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
