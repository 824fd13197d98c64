"""What an inversion found: verdict, tokens, evidence for each position, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Verdict = Literal["recovered", "probable", "ambiguous", "unmatched"]
Policy = Literal["auto", "likely", "gradient", "random", "vocabulary"]
MOST_RIVALS = 16  # tokens that fit as well, named in the evidence of one position
_SAID = 4  # of them in a sentence
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One token tried at a position."""

    token_id: int
    token: str | None  # its text alone; None without a tokenizer
    distance: float  # L2 to the observed state
    posterior: float | None = None  # under the noise model; None where there is none


@dataclass(frozen=True, kw_only=True)
class PositionEvidence:
    """Why a token was accepted at one position."""

    token_id: int
    token: str | None
    distance: float  # L2 from its state to the observed one
    tolerance: float  # largest distance that arithmetic alone explains here
    runner_up: float | None  # distance of the best other token checked; None where only one was
    n_checked: int  # tokens checked at this position
    rivals: tuple[Candidate, ...] = ()  # other tokens that fit as well, the nearest 16; not empty: ambiguous, or noise
    is_held: bool = True  # whether a row was held here; else the next one speaks for the token, and its are the numbers
    posterior: float | None = None  # of the token under the noise model; None where there is none

    @property
    def margin(self) -> float | None:
        """How much nearer the accepted token is than the runner-up."""
        return None if self.runner_up is None else self.runner_up - self.distance

    def missed(self, position: int, diagnosis: str) -> Miss:
        """Return the miss that this evidence is once its token does not count as found."""
        return Miss(
            position=position,
            token_id=self.token_id,
            token=self.token,
            distance=self.distance,
            tolerance=self.tolerance,
            n_checked=self.n_checked,
            runner_up=self.runner_up,
            diagnosis=diagnosis,
        )


@dataclass(frozen=True, kw_only=True)
class Miss:
    """The position at which no token fits: the search ends there."""

    position: int
    token_id: int  # the nearest token of the whole vocabulary
    token: str | None
    distance: float
    tolerance: float
    n_checked: int
    runner_up: float | None  # distance of the best other token; None where only one was checked
    diagnosis: str  # the likeliest cause, and what to try


def decisive_tolerance(positions: Sequence[PositionEvidence], miss: Miss | None) -> float:
    """Return the tolerance that a verdict rests on: the one that was missed, else the one met with least to spare."""
    return miss.tolerance if miss is not None else _nearest_to_its_tolerance(positions).tolerance


def _nearest_to_its_tolerance(positions: Sequence[PositionEvidence]) -> PositionEvidence:
    return max(positions, key=lambda p: p.distance / p.tolerance if p.tolerance else 0.0)


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """The result of inverting one observation."""

    model: str
    fingerprint: str  # of the model the search ran on
    layer: int
    site: str
    policy: str
    verdict: Verdict
    text: str | None  # of the tokens below; None without a tokenizer
    input_ids: tuple[int, ...]  # the recovered prompt behind the known prefix, or its beginning where "unmatched"
    seq_len: int  # tokens sought: positions behind the known prefix, holes included
    tolerance: float  # where a state comes nearest to it, or at the miss: see `decisive_tolerance`
    noise: float  # declared by the caller; L2, 0 where none was
    seconds: float
    wall_ratio: float  # seconds over those of a plain forward pass through the same blocks, in this process
    n_passes: int  # through the model, or some of its blocks
    block_tokens: int  # tokens × blocks evaluated by the search
    prefill_ratio: float  # block_tokens / (tokens × layer), those of the known prefix counted too
    calibration_block_tokens: int  # spent on measuring the tolerance, once per model, layer and site
    n_checked: int
    observation_sha256: str  # SHA-256 of the observed values
    observation_dtype: str  # of the observed values
    model_dtype: str
    positions: tuple[PositionEvidence, ...]
    miss: Miss | None = None
    known_prefix: tuple[int, ...] = ()  # token ids before the first observed row, as the caller knew them
    posterior: float | None = None  # of the whole prompt under the noise model; None where there is none
    noise_model: dict[str, Any] | None = None  # the model, its parameters, whether they were estimated
    residuals: dict[str, Any] | None = None  # how what is left of the rows compares with that noise
    row_order: tuple[int, ...] = ()  # row of the observation at each place; () where they were taken as they lie
    other_prompts: tuple[
        tuple[int, ...], ...
    ] = ()  # that fit too, where last rows alone are held; unmatched: the nearest
    column_order: tuple[int, ...] = ()  # its column at each coordinate; () where they were taken as they lie

    def record(self) -> dict[str, Any]:
        """Return the JSON record; its keys equal the field names."""
        return asdict(self)

    def summary(self) -> str:
        """Return the verdict and its evidence in a sentence or two."""
        if self.miss is not None and (self.noise_model is not None or self.other_prompts):
            return f"unmatched: {self.miss.diagnosis}."
        if self.miss is not None:
            miss = self.miss
            return (
                f"unmatched: position {miss.position}: best of {miss.n_checked} candidates is "
                f"{miss.distance:.3g} away, tolerance {self.tolerance:.2g}; {miss.diagnosis}. "
                'See "sipit invert --help".'
            )
        if self.posterior is not None and self.noise_model is not None:
            doubtful = sum((p.posterior or 0.0) < 0.95 for p in self.positions)
            return (
                f"{self.verdict}: {len(self.input_ids)} tokens, posterior {self.posterior:.3g} of the prompt under "
                f"{self.noise_model['says']}{', estimated' if self.noise_model['is_estimated'] else ''}; "
                f"{doubtful} tokens below 0.95; no proof"
            )
        worst = _nearest_to_its_tolerance(self.positions)
        text = (
            f"{self.verdict}: {len(self.input_ids)} of {self.seq_len} tokens; largest distance "
            f"{worst.distance:.2g} (tolerance {self.tolerance:.2g})"
        )
        margins = [p.runner_up for p in self.positions if p.runner_up is not None]
        if margins:
            text += f", nearest other token checked {min(margins):.3g} away"
        shared = [i for i, p in enumerate(self.positions) if p.rivals]
        if shared:
            first = self.positions[shared[0]]
            names = ", ".join(f"{r.token!r} ({r.token_id})" for r in first.rivals[:_SAID])
            if len(first.rivals) > _SAID:
                names += f" or {'at least ' * (len(first.rivals) >= MOST_RIVALS)}{len(first.rivals) - _SAID} more"
            text += (
                f"; {len(shared)} positions fit more than one token, first at {shared[0]}: "
                f"{first.token!r} ({first.token_id}) or {names}"
            )
        elif self.other_prompts:
            named = "; ".join(",".join(map(str, ids)) for ids in self.other_prompts[:4])
            text += f"; {len(self.other_prompts)} other prompts fit as well, of token ids {named}"
        elif self.verdict == "ambiguous":
            text += "; accepted within the declared noise only, as the nearest token checked"
        return text
