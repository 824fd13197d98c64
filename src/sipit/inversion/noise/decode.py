"""From noisy rows to the most probable prompt, its posterior and a verdict that noise alone cannot earn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.inversion.evidence.cost import cost_of
from sipit.inversion.evidence.result import Candidate, Inversion, PositionEvidence, Verdict, decisive_tolerance
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.inversion.judging.replay import replay
from sipit.inversion.judging.residuals import PROBABLE, Residuals, residuals_of
from sipit.inversion.judging.tolerance import tolerance_for
from sipit.inversion.noise.beam_search import Beams, BeamSearch, OnPosition
from sipit.inversion.noise.effort import Effort, effort_on
from sipit.inversion.noise.revision import Revision
from sipit.inversion.noise.start import first_guess
from sipit.inversion.noise.token_map import token_map
from sipit.inversion.search.batching import search
from sipit.inversion.search.belonging import require_belongs
from sipit.inversion.search.options import OnProgress, Progress, SearchOptions
from sipit.models import LanguageModel
from sipit.observations import Observation

_ROUNDS = 3  # of estimating the noise and decoding again
_MOST_GROWTH = 1.2  # times the first guess that the estimated noise may be
_SETTLED = 0.04  # relative change of the noise below which it counts as known
_NAMED = 0.01  # posterior from which another token is named
_MOST_BYTES = 8e9  # of the rows of all tokens, which a decoding holds
_MOST_NAMED = 8  # other tokens named at a position
_STANDS_OUT = 0.05  # of the distance of other tokens: rows nearer than that to the prompt found are its own, moved
_HELD_OUT_SLOPE = 0.5  # that held-out coordinates must exceed: of a wrong prompt they account for nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """What the rows say under one noise model."""

    noise: NoiseModel
    beams: Beams
    residuals: Residuals
    held_out_slope: float | None  # of coordinates not looked at by a second decoding; None where it was not made

    @property
    def input_ids(self) -> Tensor:
        """The most probable prompt, without its known prefix. (T,)."""
        return self.beams.input_ids[0]

    @property
    def posterior(self) -> float:
        """Of that prompt."""
        return float(self.beams.posteriors[0])


def decode(
    lm: LanguageModel,
    seen: Observation,
    noise: NoiseModel | None = None,
    *,
    meter: Meter | None = None,
    effort: Effort | None = None,
    on_position: OnPosition | None = None,
) -> Decoded:
    """Find the most probable prompt behind noisy rows.

    Args:
        lm: the model.
        seen: rows that can be this model's, complete behind their known prefix.
        noise: what happened to them; None: to be estimated with the prompt.
        meter: charged for every token run.
        effort: how much the decoding may cost.
        on_position: told the best tokens so far after every position of every decoding.

    Raises:
        OptionError: a position has no row, a row lacks values, or rows are as wide as a large vocabulary.
        ShapeError: the noise model is of another width.
    """
    _require_whole(lm, seen)
    meter, effort = meter or Meter(), effort or effort_on(lm.device)
    if noise is None:
        noise, quick = _estimated(lm, seen, meter, on_position)
    else:
        noise.require_width(seen.d_model)
        quick = BeamSearch(lm, seen, noise, meter, effort_on(lm.device, is_quick=True)).run(on_position)
    revision = Revision(lm, seen, noise, meter, effort)

    def beams_with(hint: Tensor) -> Beams:
        return BeamSearch(lm, seen, noise, meter, effort).run(on_position, hint=hint)

    def left_by(beams: Beams) -> Residuals:
        return residuals_of(lm, seen, _whole(seen, beams.input_ids[0]), noise, meter)

    beams = beams_with(revision.likeliest(quick))
    residuals, held_out = left_by(beams), None
    if float(beams.posteriors[0]) >= PROBABLE and residuals.allow_probable:
        beams = _looked_at_again(beams, revision, beams_with)
        residuals = left_by(beams)
    if float(beams.posteriors[0]) >= PROBABLE and residuals.allow_probable:
        held_out = _held_out_slope(lm, seen, noise, meter, effort)
    return Decoded(noise=noise, beams=beams, residuals=residuals, held_out_slope=held_out)


def _looked_at_again(beams: Beams, revision: Revision, search_for: Callable[[Tensor], Beams]) -> Beams:
    """Return beams whose posteriors count the prompts that differ from the best in one token and were not among them.

    Where such a prompt is likelier, the search is made again with it.
    """
    better = revision.likeliest(beams, is_thorough=True)
    if not torch.equal(better, beams.input_ids[0]):
        beams = search_for(better)
    share = 1 / (1 + float(beams.posteriors[0]) * revision.beside(beams))
    return replace(beams, posteriors=beams.posteriors * share)


def _require_whole(lm: LanguageModel, seen: Observation) -> None:
    """Refuse rows of which the likelihood under a noise model cannot be computed."""
    if not seen.is_complete:
        held = set(seen.positions)
        missing = next(p for p in range(len(seen.known_prefix), seen.n_positions) if p not in held)
        raise OptionError(
            f"no row is held at position {missing}, and under a noise model every position needs one; leave the noise "
            "out or give its L2 distance"
        )
    if seen.is_partial:
        raise OptionError(
            f"rows of which only some of the {seen.d_model} values are held have no likelihood under a noise model; "
            "leave the noise out or give its L2 distance"
        )
    n_bytes = 4 * lm.vocab_size * seen.d_model
    if n_bytes > _MOST_BYTES:
        raise OptionError(
            f"a noise model takes a row of {seen.d_model} values for each of {lm.vocab_size} tokens at {seen.cut}, "
            f"{n_bytes / 1e9:.0f} GB; leave the noise out or give its L2 distance"
        )


def _whole(seen: Observation, input_ids: Tensor) -> Tensor:
    return torch.cat([torch.tensor(seen.known_prefix, dtype=torch.long), input_ids])


def _estimated(
    lm: LanguageModel, seen: Observation, meter: Meter, on_position: OnPosition | None
) -> tuple[NoiseModel, Beams]:
    """Return the noise under which rows and prompt are likeliest, found in turn, and the last prompts."""
    noise = first_guess(token_map(lm, seen.cut, meter), seen)
    most = _MOST_GROWTH * noise.sigma  # what a wrong prompt leaves of the rows is more than lies along quiet directions
    for _ in range(_ROUNDS):
        beams = BeamSearch(lm, seen, noise, meter, effort_on(lm.device, is_quick=True)).run(on_position)
        model = lm.cut(seen.cut, seq_len=seen.n_positions)
        states = model.ordinary(_whole(seen, beams.input_ids[0]))[len(seen.known_prefix) :].cpu()
        meter.spend(seen.n_positions, model.layer)
        before, noise = noise, noise.refitted(seen.states.cpu(), states)
        noise = replace(noise, spread=noise.spread * min(1.0, most / noise.sigma))
        if abs(noise.sigma / before.sigma - 1) < _SETTLED:
            break
    return noise, beams


def _held_out_slope(lm: LanguageModel, seen: Observation, noise: NoiseModel, meter: Meter, effort: Effort) -> float:
    """Decode from half of the coordinates, and return what the states found account for in the others."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.rand(seen.d_model, generator=generator) < 0.5  # (D,)
    once = replace(effort, whole="never")
    beams = BeamSearch(lm, seen, replace(noise, unseen=hidden), meter, once).run()
    others = replace(noise, unseen=~hidden)
    return residuals_of(lm, seen, _whole(seen, beams.input_ids[0]), others, meter).slope


def verdict_of(found: Decoded) -> tuple[Verdict, str]:
    """Return the verdict, and in a sentence why it is not "probable" where it is not."""
    if not found.residuals.is_noise:
        return "unmatched", (
            f"what the most probable prompt leaves of the rows is not {found.noise.says()}: "
            f"{'; '.join(found.residuals.reasons)}; another model, layer, site or kind of noise"
        )
    if found.posterior < PROBABLE:
        return "ambiguous", f"the prompt's posterior is {found.posterior:.3g}, below {PROBABLE}"
    if found.residuals.doubts:
        return "unmatched", (
            f"no prompt that was tried explains the rows by {found.noise.says()}: {'; '.join(found.residuals.doubts)}"
        )
    if found.held_out_slope is None or found.held_out_slope < _HELD_OUT_SLOPE:
        return "unmatched", (
            "decoded from half of the coordinates, the prompt does not account for the other half, so it is the noise "
            "that was fitted; another model, layer, site or kind of noise"
        )
    return "probable", ""


def inversion_of(
    lm: LanguageModel, seen: Observation, found: Decoded, meter: Meter, *, is_estimated: bool, seconds: float
) -> Inversion:
    """Return the result of a decoding as an inversion."""
    verdict, reason = verdict_of(found)
    evidence = evidence_of(lm, seen, found)
    ids = [int(i) for i in found.input_ids]
    miss = None
    if verdict == "unmatched":
        if found.residuals.sigma * math.sqrt(seen.d_model) < _STANDS_OUT * found.residuals.gap:
            reason += (
                "; the prompt stands out all the same, as where another arithmetic moved the rows: try --pass-dtype"
            )
        worst = max(range(len(ids)), key=lambda i: evidence[i].distance)
        miss = evidence[worst].missed(worst, reason)
        ids, evidence = [], []
    estimated = {**found.noise.parameters(), "says": found.noise.says(), "is_estimated": is_estimated}
    return Inversion(
        model=lm.name,
        fingerprint=lm.fingerprint,
        layer=seen.layer,
        site=seen.site,
        policy="auto",
        verdict=verdict,
        text=lm.decode(ids),
        input_ids=tuple(ids),
        known_prefix=seen.known_prefix,
        seq_len=seen.seq_len,
        tolerance=decisive_tolerance(evidence, miss),
        noise=0.0,
        **cost_of(lm, seen, meter, seconds),
        observation_sha256=seen.digest(),
        observation_dtype=seen.dtype,
        model_dtype=lm.arithmetic,
        positions=tuple(evidence),
        miss=miss,
        posterior=None if verdict == "unmatched" else found.posterior,
        noise_model=estimated,
        residuals={**found.residuals.record(), "held_out_slope": found.held_out_slope},
    )


def evidence_of(lm: LanguageModel, seen: Observation, found: Decoded) -> list[PositionEvidence]:
    """Return the evidence for every token of the most probable prompt, its posterior among it."""
    model = lm.cut(seen.cut, seq_len=seen.n_positions)
    states = model.ordinary(_whole(seen, found.input_ids))[len(seen.known_prefix) :].cpu().double()
    distances = (seen.states.cpu().double() - found.noise.expected(states)).norm(dim=1)
    tolerance = tolerance_for(lm, seen).total
    evidence = []
    for row, token_id in enumerate(found.input_ids.tolist()):
        posteriors = found.beams.token_posteriors[row]
        best, run = posteriors.topk(min(_MOST_NAMED + 1, len(posteriors))), found.beams.distances[row]
        named = [
            Candidate(token_id=i, token=lm.decode([i]), distance=run[i], posterior=p)
            for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if i != token_id and i in run and p >= _NAMED
        ]
        others = [d for i, d in run.items() if i != token_id]
        evidence.append(
            PositionEvidence(
                token_id=token_id,
                token=lm.decode([token_id]),
                distance=float(distances[row]),
                tolerance=float(tolerance[row]),
                runner_up=min(others, default=None),
                n_checked=len(others) + 1,
                rivals=tuple(named[:_MOST_NAMED]),
                posterior=float(posteriors[token_id]),
            )
        )
    return evidence


def invert_noisy(
    lm: LanguageModel,
    seen: Observation,
    noise: NoiseModel | None = None,
    *,
    is_whole: bool = False,
    on_progress: OnProgress | None = None,
) -> Inversion:
    """Return the most probable prompt behind noisy rows as an inversion, or a recovered one where nothing is noisy.

    Args:
        lm: the model.
        seen: the rows, complete behind their known prefix.
        noise: what happened to them; None: to be estimated with the prompt.
        is_whole: run the whole vocabulary behind the best prompt at every position.
        on_progress: told after every position how far the decoding under way is.

    Raises:
        ShapeError, MismatchError: the observation cannot be this model's, or the noise model is of another width.
        OptionError: a position has no row, a row lacks values, or rows are as wide as a large vocabulary.
    """
    require_belongs(lm, seen)
    began, meter = time.perf_counter(), Meter()

    def tell(input_ids: Sequence[int]) -> None:
        if on_progress is not None:
            on_progress(
                Progress(
                    seq_len=seen.seq_len,
                    input_ids=tuple(input_ids),
                    n_checked=meter.n_checked,
                    n_passes=meter.n_passes,
                    block_tokens=meter.block_tokens,
                    seconds=time.perf_counter() - began,
                )
            )

    effort = effort_on(lm.device, is_whole=is_whole)
    found = decode(lm, seen, noise, meter=meter, effort=effort, on_position=tell)
    if _explained_by_arithmetic(lm, seen, found, meter):
        return search(lm, seen, SearchOptions(hint=found.input_ids.tolist(), on_progress=on_progress))
    seconds = time.perf_counter() - began
    return inversion_of(lm, seen, found, meter, is_estimated=noise is None, seconds=seconds)


def _explained_by_arithmetic(lm: LanguageModel, seen: Observation, found: Decoded, meter: Meter) -> bool:
    """Whether the prompt's own states lie within tolerance of all rows, so that no noise needs to be assumed."""
    compared = replay(lm, seen, _whole(seen, found.input_ids))
    meter.spend(compared.block_tokens // max(seen.layer, 1), seen.layer)
    return bool((compared.over <= 0).all())
