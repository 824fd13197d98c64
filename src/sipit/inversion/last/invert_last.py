"""From the states of a prompt's last tokens alone, most often one vector, to the prompt.

A prompt network proposes, whole prompts are run, and what comes near is repaired, for so many seconds. Only an
ordinary forward pass within tolerance makes a prompt the answer; "unmatched" says that none was found in that time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sipit.errors import OptionError, ShapeError
from sipit.inversion.evidence.cost import cost_of
from sipit.inversion.evidence.result import Inversion, Miss, PositionEvidence, Verdict, decisive_tolerance
from sipit.inversion.fitting.prompts import last_differences, linear_prompts
from sipit.inversion.inverses.prompt_network import PromptReader
from sipit.inversion.inverses.prompt_store import load_prompt_fit
from sipit.inversion.inverses.restored import restored
from sipit.inversion.judging.replay import replay
from sipit.inversion.judging.tolerance import tolerance_for
from sipit.inversion.last.additive import metric_of, together
from sipit.inversion.last.decode import Prompt, conditional_logs, ranked_prompts
from sipit.inversion.last.judge import LastJudge
from sipit.inversion.last.repair import by_slope, repaired, swept
from sipit.inversion.search.belonging import require_belongs
from sipit.models import LanguageModel
from sipit.observations import Observation, Site

_BEAMS = (64, 512, 2048)  # prompts kept a length, in the first reading and those that follow
_MENDED = 6  # nearest prompts that are repaired before the next reading
_TOGETHER = 384  # tokens tried in each place of a prompt, whose changes are then added up
_SINGLES = 64  # prompts of one token whose states tell what such a state looks like
_LIKE_A_FIRST = 0.8  # cosine with their mean, from which on every single token is tried
_MOST_TOKENS = 12  # as long as a prompt network reads


@dataclass(frozen=True, kw_only=True)
class LastOptions:
    """Which prompts are sought, and for how long.

    Raises:
        OptionError: one of them is out of range.
    """

    max_tokens: int = 8
    length: int | None = None  # of the prompt, where that is known
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or (self.length is not None and self.length < 1):
            raise OptionError("max_tokens and length count tokens; pass 1 or more")
        if (self.length or self.max_tokens) > _MOST_TOKENS:
            raise OptionError(
                f"prompts of up to {_MOST_TOKENS} tokens are sought; pass max_tokens or length within that"
            )
        if not self.seconds > 0:
            raise OptionError(f"seconds is {self.seconds}; pass a number above 0")

    def lengths(self, n_rows: int) -> range:
        """Return the numbers of tokens that are sought behind so many rows.

        Raises:
            OptionError: there are more rows than tokens.
        """
        longest = self.length or self.max_tokens
        if longest < n_rows:
            raise OptionError(f"{n_rows} rows are those of {n_rows} tokens or more, and {longest} at most are sought")
        return range(self.length or n_rows, longest + 1)


OnLastProgress = Callable[["LastProgress"], None]


@dataclass(frozen=True, kw_only=True)
class LastProgress:
    """Where a search for the whole prompt stands."""

    n_tried: int
    nearest: Prompt  # so far
    distance: float  # of it, L2
    seconds: float
    budget: float


def invert_last(
    lm: LanguageModel,
    state: Observation | Tensor | Any,
    *,
    layer: int | None = None,
    site: Site | None = None,
    max_tokens: int = 8,
    length: int | None = None,
    seconds: float = 60.0,
    use_fit: bool = True,
    on_progress: OnLastProgress | None = None,
) -> Inversion:
    """Recover a prompt from the states of its last tokens alone, or say that it was not found in time.

    Args:
        lm: the model the state comes from.
        state: (d_model,) of the last token, or (k, d_model) of the last k; or an Observation of such rows, which
            says the length where it says their positions.
        layer: number of blocks run; an Observation brings its own.
        site: what leaked, "block" by default.
        max_tokens: longest prompt that is sought.
        length: tokens of the prompt, where that is known.
        seconds: the budget, without what is prepared once for a model and cut. The search ends with the first prompt
            that fits, once what may fit beside it was tried.
        use_fit: whether to use a prompt network that `sipit fit --last` has made; else linear maps are solved first,
            which takes some seconds and finds short prompts.
        on_progress: called after each pass.

    Returns:
        "recovered": the ordinary pass of these tokens ends within tolerance of the observed rows, and no other
        prompt that was tried does; "ambiguous": several do, which are named; "unmatched": none was found within the
        budget, which is no proof of anything. The evidence of every token is that of the last row.

    Raises:
        ShapeError, NonFiniteError, MismatchError: the rows are not this model's.
        OptionError: an argument is out of range, or the observation says more than its last rows.
    """
    began = time.perf_counter()
    if length is None and isinstance(state, Observation) and state.positions[0] > 0:
        length = state.n_sought
    options = LastOptions(max_tokens=max_tokens, length=length, seconds=seconds)
    seen = _last_rows(lm, state, layer, site)
    lengths = options.lengths(seen.seq_len)
    require_belongs(lm, seen)
    reading = _reading(lm, seen, lengths, use_fit=use_fit)
    searching = time.perf_counter()
    judge = LastJudge(lm=lm, seen=seen, deadline=searching + seconds)
    if on_progress is not None:
        judge.on_tried = _teller(judge, on_progress, searching, seconds)
    _search(lm, judge, reading)
    if judge.fitting:
        judge.score(_beside(lm, judge.fitting[0], lengths), to_the_end=True)
    return _result(lm, judge, began, seconds, lengths)


def holds_last_alone(seen: Observation) -> bool:
    """Whether the last rows alone are held, of a prompt short enough to be sought whole; one missing row is none."""
    first = seen.positions[0]
    is_short = first > 1 and not seen.known_prefix and seen.n_sought <= _MOST_TOKENS
    return seen.is_last or (is_short and seen.positions == tuple(range(first, first + seen.seq_len)))


def _last_rows(lm: LanguageModel, state: Any, layer: int | None, site: Site | None) -> Observation:
    if isinstance(state, Observation):
        if layer not in (None, state.layer) or site not in (None, state.site):
            raise OptionError(f"the observation was taken at {state.cut} and says so; leave layer and site out")
        return state if state.is_last else state.last_rows(state.seq_len)
    try:
        rows = torch.as_tensor(state).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"cannot read a state from {type(state).__name__}; pass an array (d_model,)") from error
    site = site or "block"
    rows = rows[None] if rows.ndim == 1 else rows
    return Observation(states=rows, layer=lm.checked_layer(layer, site), site=site, is_last=True)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What proposes prompts for one state."""

    reader: PromptReader
    white: Tensor  # (1, D) of the state of the last token
    metric: Tensor | None  # (W, W), see `metric_of`; None where changes of states do not add up
    lengths: range  # that are sought and can be read


def _reading(lm: LanguageModel, seen: Observation, lengths: range, *, use_fit: bool) -> _Reading:
    """Prepare what proposes: once for a model and cut, some seconds without a prompt network."""
    reading = restored(lm, seen.cut)
    fit = load_prompt_fit(lm, reading.cut) if use_fit else None
    if fit is not None:
        network = fit.network
    else:
        network = lm.derived(("linear prompts", reading.cut), lambda: linear_prompts(lm, reading.cut))
    lengths = range(lengths[0], min(lengths[-1], network.max_tokens) + 1)
    state = reading.rows(seen.states[-1:].to(lm.device), torch.tensor([lengths[-1]], device=lm.device))
    metric = None
    if not seen.is_partial and seen.layer > 0:
        metric = lm.derived(("last metric", seen.cut), lambda: metric_of(last_differences(lm, seen.cut)))
    return _Reading(reader=PromptReader(lm, network), white=network.white(state), metric=metric, lengths=lengths)


def _search(lm: LanguageModel, judge: LastJudge, reading: _Reading) -> None:
    """Propose and try until a prompt fits or the time is up."""
    seen, lengths = judge.seen, reading.lengths
    if seen.layer == 0 or _is_single(lm, seen, lengths):
        judge.score((token,) for token in range(lm.vocab_size))
    mended: set[Prompt] = set()
    for n_beams in _BEAMS:
        if judge.is_over and judge.tried:
            return
        judge.score(ranked_prompts(reading.reader, reading.white, n_beams=n_beams, lengths=lengths))
        _mend(lm, judge, reading, mended, _MENDED)
    while not judge.is_over:
        before = len(judge.tried)
        _mend(lm, judge, reading, mended, 2 * _MENDED)
        judge.score(itertools.islice(swept(reading.reader, reading.white, judge.best), 1 << 14))
        if len(judge.tried) == before:  # all that is near was tried: every prompt one token away from another
            for prompt in judge.nearest(64):
                judge.score(swept(reading.reader, reading.white, prompt))
            return


def _mend(lm: LanguageModel, judge: LastJudge, reading: _Reading, mended: set[Prompt], n: int) -> None:
    """Repair the nearest prompts, and what that brings nearer, one after the other."""
    reader, white = reading.reader, reading.white
    for _ in range(n):
        waiting = [prompt for prompt in judge.nearest(n + len(mended)) if prompt not in mended]
        if not waiting or judge.is_over:
            return
        prompt = waiting[0]
        mended.add(prompt)
        if reading.metric is not None and len(prompt) > 1:
            tokens = conditional_logs(reader, white, prompt).topk(min(_TOGETHER, lm.vocab_size), dim=1).indices
            judge.score(together(judge, prompt, tokens, reading.metric))
        judge.score(repaired(reader, white, prompt, reading.lengths))
        if not judge.is_over:
            judge.score(by_slope(lm, judge.seen, prompt))


def _is_single(lm: LanguageModel, seen: Observation, lengths: range) -> bool:
    """Whether the state looks like that of a prompt of one token, which is another kind in most models."""
    if 1 not in lengths:
        return False
    if lengths[-1] == 1:
        return True
    ids = torch.arange(_SINGLES)[:, None] * 7919 % lm.vocab_size
    firsts = lm.cut(seen.cut).ordinary_batch(ids)[:, 0].float()  # (N, W)
    pairs = lm.cut(seen.cut).ordinary_batch(torch.cat([ids, ids.roll(1, 0)], dim=1))[:, 1].float()
    held = seen.states[-1:].to(firsts.device).float()
    near_first, near_other = (
        torch.nn.functional.cosine_similarity(held, rows.mean(dim=0, keepdim=True)) for rows in (firsts, pairs)
    )
    return bool(near_first > max(_LIKE_A_FIRST, float(near_other)))


def _beside(lm: LanguageModel, prompt: Prompt, lengths: range) -> Iterator[Prompt]:
    """Yield prompts whose states may be equal by design: a token repeated more or less often, tokens of equal rows."""
    for place, token in enumerate(prompt):
        if len(prompt) + 1 in lengths:
            yield (*prompt[:place], token, *prompt[place:])
        if len(prompt) - 1 in lengths:
            yield (*prompt[:place], *prompt[place + 1 :])
        for twin in lm.embeddings.twins(token):
            yield (*prompt[:place], twin, *prompt[place + 1 :])
    for again in lengths:
        if len(set(prompt)) == 1:
            yield (prompt[0],) * again


def _result(lm: LanguageModel, judge: LastJudge, began: float, budget: float, lengths: range) -> Inversion:
    fitting = list(dict.fromkeys(judge.fitting))
    best: Prompt = fitting[0] if fitting else judge.best
    seen = judge.seen.ending_at(max(len(best), lengths[0]))
    verdict: Verdict = "recovered" if len(fitting) == 1 else "ambiguous" if fitting else "unmatched"
    others = sorted(distance for prompt, distance in judge.tried.items() if prompt not in fitting)
    runner_up = others[0] if others else None
    positions: tuple[PositionEvidence, ...] = ()
    miss = None
    if fitting:
        found = replay(lm, seen, torch.tensor(best))
        judge.meter.spend(found.block_tokens, 1)
        worst = int(found.over.argmax())
        first_row = seen.positions[0]
        positions = tuple(
            PositionEvidence(
                token_id=token,
                token=lm.decode([token]),
                distance=float(found.distances[worst]),
                tolerance=float(found.allowed[worst]),
                runner_up=runner_up,
                n_checked=len(judge.tried),
                is_held=place >= first_row,
            )
            for place, token in enumerate(best)
        )
    else:
        distance = judge.tried.get(best, 0.0)
        miss = Miss(
            position=max(len(best) - 1, 0),
            token_id=best[-1] if best else 0,
            token=lm.decode(best[-1:]) if best else None,
            distance=distance,
            tolerance=float(tolerance_for(lm, seen).total.max()),
            n_checked=len(judge.tried),
            runner_up=others[1] if len(others) > 1 else None,
            diagnosis=_diagnosis(lm, judge, best, budget, lengths),
        )
    ids = best if fitting else ()
    return Inversion(
        model=lm.name,
        fingerprint=lm.fingerprint,
        layer=seen.layer,
        site=seen.site,
        policy="auto",
        verdict=verdict,
        text=lm.decode(ids),
        input_ids=ids,
        seq_len=seen.n_sought,
        tolerance=decisive_tolerance(positions, miss),
        noise=0.0,
        observation_sha256=seen.digest(),
        observation_dtype=seen.dtype,
        model_dtype=str(lm.dtype).removeprefix("torch."),
        positions=positions,
        miss=miss,
        other_prompts=tuple(fitting[1:]) if fitting else (best,),
        **cost_of(lm, seen, judge.meter, time.perf_counter() - began),
    )


def _diagnosis(lm: LanguageModel, judge: LastJudge, best: Prompt, budget: float, lengths: range) -> str:
    """Say what was not found, within which budget, and what came nearest."""
    sought = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
    said = f"no prompt of {sought} tokens was found within {budget:g} s and {len(judge.tried):,} prompts tried"
    if best:
        shown = lm.decode(best)
        shown = repr(shown) if shown is not None else str(list(best))
        said += f"; the nearest is {shown}, {judge.tried[best]:.3g} away"
    return f"{said}; give it more seconds, a prompt network (sipit fit --last), or the prompt may be longer"


def _teller(judge: LastJudge, on_progress: OnLastProgress, began: float, budget: float) -> Callable[[int], None]:
    def tell(n_tried: int) -> None:
        on_progress(
            LastProgress(
                n_tried=n_tried,
                nearest=judge.best,
                distance=judge.tried[judge.best],
                seconds=time.perf_counter() - began,
                budget=budget,
            )
        )

    return tell
