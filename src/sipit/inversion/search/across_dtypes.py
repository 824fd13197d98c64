"""States of a pass in another arithmetic: sought in the model's own, judged in theirs.

A server computes in bfloat16, an auditor's machine in float32: their states of one prompt lie a per cent apart, far
beyond what float32 explains. So the search runs in the dtype that is fast here, on rows that may be off by as much as
the two passes were measured to differ, coordinate by coordinate; and the prompt that it comes to, with all that may fit
beside it, is replayed by one ordinary pass in the rows' own dtype. That pass decides. A state that differs by far more
than others do, as those of some rare tokens and of those that attention uses as sinks, stops the search: the nearest
token is then judged by that pass at once, and if it is not that one, the whole vocabulary is tried in that arithmetic.
Shapes: T rows, W = width of a row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.float64 import as_float64
from sipit.inversion.evidence.cost import charge, cost_of
from sipit.inversion.evidence.result import (
    MOST_RIVALS,
    Candidate,
    Inversion,
    Miss,
    PositionEvidence,
    Verdict,
    decisive_tolerance,
)
from sipit.inversion.judging.calibration import calibration_prompts
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise import CLEAR, noise_floor
from sipit.inversion.judging.replay import Replay, replay
from sipit.inversion.search.batching import search
from sipit.inversion.search.belonging import require_belongs
from sipit.inversion.search.options import OnProgress, Progress, SearchOptions
from sipit.models import LanguageModel, in_pass
from sipit.observations import Cut, Observation
from sipit.observations.rounding import as_rounded

_WIDE, _WIDEST = 4.0, 16.0  # times the measured difference that a coordinate may be off by: as wrong tokens leave room
_PATIENCE = 512  # candidates tried in vain before the nearest of them is judged by the other dtype's pass
_USUAL = 0.95  # quantile of the rows' differences: those beyond it amplify roundings, and are judged one by one


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far the two passes' states lie apart, over a state's norm, in each coordinate."""

    first: Tensor  # (W,) at position 0: the largest seen
    rest: Tensor  # (W,) at later positions: one standard deviation

    def half_steps(self, lm: LanguageModel, seen: Observation) -> Tensor:
        """Return how far each observed value may be off. (T, W) float32."""
        norms = seen.states.cpu().float().norm(dim=1, keepdim=True)  # (T, 1)
        is_first = torch.tensor(seen.positions)[:, None] == 0
        floor = noise_floor(lm, seen.cut, seen.n_positions)
        first, rest = _widened(self.first, floor.first_gap), _widened(self.rest, floor.rest_gap)
        half_steps: Tensor = norms * torch.where(is_first, first, rest)
        return half_steps


def _widened(deviations: Tensor, gap: float) -> Tensor:
    """Return how far coordinates may be off, where wrong tokens lie a gap away. (W,) → (W,)."""
    room = CLEAR * gap / float(deviations.norm().clamp(min=1e-30))
    return deviations * min(max(room, _WIDE), _WIDEST)


def drift(lm: LanguageModel, other: LanguageModel, cut: Cut, meter: Meter) -> Drift:
    """Return the measured difference of two models' states of the calibration prompts, made once."""

    def made() -> Drift:
        firsts, rests = [], []
        for ids in calibration_prompts(lm):
            own = as_float64(lm.cut(cut).ordinary(ids)).cpu()  # (T, W)
            gaps = (as_float64(other.cut(cut).ordinary(ids)).cpu() - own) / own.norm(dim=1, keepdim=True)
            meter.spend(2 * len(ids), cut.layer, passes=1)
            firsts.append(gaps[:1])
            rests.append(gaps[1:])
        few = torch.cat(firsts)  # of which the largest errors count, since there are a dozen
        return Drift(first=few.abs().amax(dim=0).float(), rest=_deviations(torch.cat(rests)))

    return lm.derived(("drift", cut, other.arithmetic), made)


def _deviations(gaps: Tensor) -> Tensor:
    """Return each coordinate's root mean square over the rows that are not far off. (N, W) → (W,) float32."""
    lengths = gaps.norm(dim=1)
    usual = gaps[lengths <= lengths.quantile(_USUAL)]
    return usual.square().mean(dim=0).sqrt().float()


def search_across_dtypes(lm: LanguageModel, seen: Observation, pass_dtype: str, options: SearchOptions) -> Inversion:
    """Recover the prompt of states that a pass in another dtype than the model's left.

    Args:
        lm: the model, in the dtype that the search is to run in.
        seen: rows of every position behind the known prefix.
        pass_dtype: what the pass computed in, by name: one of `sipit.models.PASSES`.
        options: how to search.

    Returns:
        An inversion by the model in that dtype: its record names that one, and `sipit check` replays it there.

    Raises:
        OptionError: positions without a row, or a model that is held quantised.
        ModelError: the dtype is too coarse at this layer: wrong tokens' states lie as near as its own arithmetic.
    """
    if not seen.is_complete or seen.is_partial:
        raise OptionError(
            "rows of a pass in another dtype must be whole and of every position behind the known prefix; invert "
            "others with the model in the pass's own dtype"
        )
    other = in_pass(lm, pass_dtype)
    require_belongs(other, seen)
    began, meter = time.perf_counter(), Meter()
    values, _, half = as_rounded(seen.states) if seen.half_step is None else (seen.states, None, seen.half_step)
    half = drift(lm, other, seen.cut, meter).half_steps(lm, seen) + (0.0 if half is None else half.cpu())
    relaxed = replace(seen, states=values, half_step=half.to(values.device), fingerprint=None, model=None)
    last, evidence = _sought(lm, other, seen, relaxed, options=options, meter=meter)
    ids, miss = [one.token_id for one in evidence], last.miss
    verdict: Verdict = "unmatched"
    if miss is None:
        found = _replayed(other, seen, ids, meter)
        evidence, verdict = _judged(other, seen, evidence, found, meter), "recovered"
        if any(one.rivals for one in evidence):
            verdict = "ambiguous"
        wrong = (found.over > 0).nonzero()[:, 0].tolist()
        if wrong:
            first, verdict = wrong[0], "unmatched"
            diagnosis = (
                f"the nearest prompt's own pass in {pass_dtype} leaves more than its arithmetic explains: another "
                "arithmetic, layer, site or model, or noise"
            )
            miss = evidence[first].missed(seen.positions[first], diagnosis)
            ids, evidence = ids[:first], evidence[:first]
    return replace(
        last,
        fingerprint=other.fingerprint,
        verdict=verdict,
        text=lm.decode(ids),
        input_ids=tuple(ids),
        known_prefix=seen.known_prefix,
        seq_len=seen.n_sought,
        tolerance=decisive_tolerance(evidence, miss),
        **cost_of(lm, seen, meter, time.perf_counter() - began),
        observation_sha256=seen.digest(),
        observation_dtype=seen.dtype,
        model_dtype=pass_dtype,
        positions=tuple(evidence),
        miss=miss,
    )


def _sought(
    lm: LanguageModel,
    other: LanguageModel,
    seen: Observation,
    relaxed: Observation,
    *,
    options: SearchOptions,
    meter: Meter,
) -> tuple[Inversion, list[PositionEvidence]]:
    """Search on the relaxed rows; where it stops, settle the position by passes in the other arithmetic.

    Returns the last of the searches, which has the miss, if there is one, and the evidence of all of them.
    """
    evidence: list[PositionEvidence] = []
    while True:
        done = [one.token_id for one in evidence]
        on_progress = _after(options.on_progress, done, seen.n_sought)
        hint = options.hint[len(done) :]
        part = replace(options, hint=hint, on_progress=on_progress, patience=_PATIENCE, pass_dtype=None)
        found = search(lm, _behind(relaxed, done), part)
        charge(meter, found)
        evidence += found.positions
        if found.miss is None:
            return found, evidence
        ids = [*done, *found.input_ids]
        one = _if_theirs(other, seen, ids, _nearest(lm, found.miss), meter, by_floor=True)
        if one is None:  # not that one: the whole vocabulary, in the arithmetic that left the row
            on_progress = _after(options.on_progress, ids, seen.n_sought)
            there = replace(options, hint=(), on_progress=on_progress, patience=None, pass_dtype=None)
            own = search(other, _first_row(_behind(seen, ids)), there)
            charge(meter, own)
            one = own.positions[0] if own.miss is None else _if_theirs(other, seen, ids, _nearest(lm, own.miss), meter)
            if one is None:
                return replace(found, miss=own.miss), evidence
        evidence.append(one)
        if len(evidence) == seen.n_sought:
            return replace(found, miss=None), evidence


def _nearest(lm: LanguageModel, miss: Miss) -> PositionEvidence:
    """Return the nearest token of a position where nothing fitted, as evidence that is still to be judged."""
    return PositionEvidence(
        token_id=miss.token_id,
        token=miss.token,
        distance=miss.distance,
        tolerance=miss.tolerance,
        runner_up=miss.runner_up,
        n_checked=miss.n_checked,
        rivals=_twins_of(lm, miss),
    )


def _if_theirs(
    other: LanguageModel,
    seen: Observation,
    ids: Sequence[int],
    one: PositionEvidence,
    meter: Meter,
    *,
    by_floor: bool = False,
) -> PositionEvidence | None:
    """Return a token's evidence by an ordinary pass in the other arithmetic; None where its state is not the row's.

    The pass is as long as the one that left the rows, for kernels of other shapes may put a state far off; what
    follows the token changes no state before it.

    Args:
        by_floor: whether the noise floor alone must explain the row: a state that amplifies rounding, perhaps a wrong
            token's, leaves so much room that others would have to be tried beside it.
    """
    n_rows = len(ids) + 1
    ahead = replace(seen, states=seen.states[:n_rows], half_step=_first_rows(seen.half_step, n_rows), positions=())
    judged = _replayed(other, ahead, [*ids, *[one.token_id] * (seen.n_sought - len(ids))], meter)
    if float(judged.over[-1]) > 0 or (by_floor and bool(judged.needs_noise[-1])):
        return None
    return replace(one, distance=float(judged.distances[-1]), tolerance=float(judged.allowed[-1]))


def _twins_of(lm: LanguageModel, miss: Miss) -> tuple[Candidate, ...]:
    """Return tokens with nearly the row of one that no search checked others beside, as candidates to be replayed."""
    twins = lm.embeddings.twins(miss.token_id)
    return tuple(Candidate(token_id=i, token=lm.decode([i]), distance=miss.distance) for i in twins[:MOST_RIVALS])


def _first_rows(half_step: Tensor | None, n: int) -> Tensor | None:
    return None if half_step is None else half_step[:n]


def _behind(seen: Observation, ids: Sequence[int]) -> Observation:
    """Return the rows behind tokens that are settled, which join the known prefix."""
    n = len(ids)
    half = None if seen.half_step is None else seen.half_step[n:]
    return replace(
        seen,
        states=seen.states[n:],
        half_step=half,
        known_prefix=(*seen.known_prefix, *ids),
        positions=seen.positions[n:],
    )


def _first_row(seen: Observation) -> Observation:
    half_step, positions = _first_rows(seen.half_step, 1), seen.positions[:1]
    return replace(seen, states=seen.states[:1], half_step=half_step, positions=positions)


def _after(on_progress: OnProgress | None, done: Sequence[int], seq_len: int) -> OnProgress | None:
    """Return what tells the progress of a search behind settled tokens as that of the whole."""
    if on_progress is None:
        return None

    def tell(progress: Progress) -> None:
        on_progress(replace(progress, seq_len=seq_len, input_ids=(*done, *progress.input_ids)))

    return tell


def _replayed(other: LanguageModel, seen: Observation, ids: Sequence[int], meter: Meter) -> Replay:
    found = replay(other, seen, torch.tensor([*seen.known_prefix, *ids]))
    meter.spend(found.block_tokens // max(seen.layer, 1), seen.layer)
    return found


def _judged(
    other: LanguageModel, seen: Observation, evidence: Sequence[PositionEvidence], found: Replay, meter: Meter
) -> list[PositionEvidence]:
    """Return the evidence as the other dtype's pass has it: of tokens that may fit beside, those that do.

    Where more of them fitted the relaxed rows than evidence names, all that are named stay: some were not replayed.
    """
    ids = [one.token_id for one in evidence]
    judged = []
    for place, one in enumerate(evidence):
        rivals = list(one.rivals)
        if len(rivals) < MOST_RIVALS:
            rivals = [
                rival
                for rival in rivals
                if bool((_replayed(other, seen, _swapped(ids, place, rival.token_id), meter).over <= 0).all())
            ]
        distance, tolerance = float(found.distances[place]), float(found.allowed[place])
        judged.append(replace(one, distance=distance, tolerance=tolerance, rivals=tuple(rivals)))
    return judged


def _swapped(ids: Sequence[int], place: int, token_id: int) -> list[int]:
    return [*ids[:place], token_id, *ids[place + 1 :]]
