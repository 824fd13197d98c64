"""From the states of a prompt's last tokens alone, most often one vector, to the prompt.

Prompts are proposed and run whole, for so many seconds. Only an ordinary forward pass within tolerance makes a
prompt the answer; "unmatched" says that none was found in that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sipit.errors import OptionError, ShapeError
from sipit.inversion.evidence.cost import cost_of
from sipit.inversion.evidence.result import Inversion, Miss, PositionEvidence, Verdict, decisive_tolerance
from sipit.inversion.judging.replay import replay
from sipit.inversion.judging.tolerance import tolerance_for
from sipit.inversion.last.decode import Prompt
from sipit.inversion.last.judge import LastJudge
from sipit.inversion.last.portfolio import MIXED, MOST_READ, search_last
from sipit.inversion.search.belonging import require_belongs
from sipit.models import LanguageModel
from sipit.observations import Observation, Site

_MOST_TOKENS = 24  # of a prompt that is sought


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
    judge = LastJudge(lm=lm, seen=seen, budget=seconds)
    if on_progress is not None:
        judge.on_tried = _teller(judge, on_progress)
    search_last(lm, judge, lengths, use_fit=use_fit)
    if judge.fitting:
        judge.score(_beside(lm, judge.fitting[0], lengths), to_the_end=True)
    return _result(lm, judge, began, lengths)


def holds_last_alone(seen: Observation) -> bool:
    """Whether the last rows alone are held, of a prompt short enough to be sought whole; one missing row is none."""
    first = seen.positions[0]
    most = _MOST_TOKENS if seen.cut == MIXED else MOST_READ
    is_short = first > 1 and not seen.known_prefix and seen.n_sought <= most
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


def _result(lm: LanguageModel, judge: LastJudge, began: float, lengths: range) -> Inversion:
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
            diagnosis=_diagnosis(lm, judge, best, lengths),
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
        model_dtype=lm.arithmetic,
        positions=positions,
        miss=miss,
        other_prompts=tuple(fitting[1:]) if fitting else (best,),
        **cost_of(lm, seen, judge.meter, time.perf_counter() - began),
    )


def _diagnosis(lm: LanguageModel, judge: LastJudge, best: Prompt, lengths: range) -> str:
    """Say what was not found, within which budget, and what came nearest."""
    sought = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
    said = f"no prompt of {sought} tokens was found within {judge.budget:g} s and {len(judge.tried):,} prompts tried"
    if best:
        shown = lm.decode(best)
        shown = repr(shown) if shown is not None else str(list(best))
        said += f"; the nearest is {shown}, {judge.tried[best]:.3g} away"
    return f"{said}; give it more seconds, a prompt network (sipit fit --last), or the prompt may be longer"


def _teller(judge: LastJudge, on_progress: OnLastProgress) -> Callable[[int], None]:
    def tell(n_tried: int) -> None:
        on_progress(
            LastProgress(
                n_tried=n_tried,
                nearest=judge.best,
                distance=judge.tried[judge.best],
                seconds=judge.seconds,
                budget=judge.budget,
            )
        )

    return tell
