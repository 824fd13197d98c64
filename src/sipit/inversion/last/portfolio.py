"""What is proposed for a prompt's last state, and in which order, until one fits or the time is up.

Behind the first block the state is unmixed. Elsewhere, and where that finds nothing, a prompt network reads prompts,
and those that come nearest are repaired.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.inversion.fitting.prompts import last_differences, linear_prompts
from sipit.inversion.inverses.prompt_network import PromptReader
from sipit.inversion.inverses.prompt_store import load_prompt_fit
from sipit.inversion.inverses.restored import restored
from sipit.inversion.inverses.ridge_inverse import ridge_inverse
from sipit.inversion.last.additive import metric_of, together
from sipit.inversion.last.decode import Prompt, conditional_logs, ranked_prompts
from sipit.inversion.last.judge import LastJudge
from sipit.inversion.last.mixture import Mixture, decoded, heads_of, mixture_of
from sipit.inversion.last.repair import by_slope, repaired, swept
from sipit.models import LanguageModel
from sipit.observations import Cut, Observation

_BEAMS = (64, 512, 2048)  # prompts kept a length, in the first reading and those that follow
_MENDED = 6  # nearest prompts that are repaired before the next reading
_TOGETHER = 384  # tokens tried in each place of a prompt, whose changes are then added up
_SINGLES = 64  # prompts of one token whose states tell what such a state looks like
_LIKE_A_FIRST = 0.8  # cosine with their mean, from which on every single token is tried
_BEAMS_OF_MIXTURES = (48, 192)  # prompts kept after each token, at first and where that found none
_LASTS = (16, 64)  # tokens that a prompt may end in, at first and where that found none
MIXED = Cut(1)  # where the last state is a mixture of its tokens
MOST_READ = 12  # tokens that linear maps and prompt networks read
_BLUR = 6e-8  # of a state's norm: what arithmetic in float32 moves it by


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
    lengths = range(min(lengths[0], network.max_tokens), min(lengths[-1], network.max_tokens) + 1)
    state = reading.rows(seen.states[-1:].to(lm.device), torch.tensor([lengths[-1]], device=lm.device))
    metric = None
    if not seen.is_partial and seen.layer > 0:
        metric = lm.derived(("last metric", seen.cut), lambda: metric_of(last_differences(lm, seen.cut)))
    return _Reading(reader=PromptReader(lm, network), white=network.white(state), metric=metric, lengths=lengths)


def search_last(lm: LanguageModel, judge: LastJudge, sought: range, *, use_fit: bool) -> None:
    """Propose prompts of the lengths that are sought and try them, until one fits or the time is up.

    What is prepared once for a model and cut does not count as time.

    Raises:
        OptionError: all lengths are beyond what can be read at this cut.
    """
    seen = judge.seen
    if seen.layer == 0 or _is_single(lm, seen, sought):
        judge.score((token,) for token in range(lm.vocab_size))
    mixture = None
    if seen.cut == MIXED and not seen.is_partial:
        with judge.paused():
            mixture = mixture_of(lm)
    if mixture is None and sought[0] > MOST_READ:
        raise OptionError(
            f"prompts of up to {MOST_READ} tokens are sought at {seen.cut} of this model; pass max_tokens or length "
            "within that"
        )
    if mixture is not None:
        _unmix(lm, judge, mixture, sought, n_beams=_BEAMS_OF_MIXTURES[0], n_lasts=_LASTS[0])
    if judge.is_over and judge.tried:
        return
    with judge.paused():
        reading = _reading(lm, seen, sought, use_fit=use_fit)
    judge.score(ranked_prompts(reading.reader, reading.white, n_beams=_BEAMS[0], lengths=reading.lengths))
    if mixture is not None:
        _unmix(lm, judge, mixture, sought, n_beams=_BEAMS_OF_MIXTURES[1], n_lasts=_LASTS[1])
    _read_and_mend(lm, judge, reading)


def _read_and_mend(lm: LanguageModel, judge: LastJudge, reading: _Reading) -> None:
    """Repair what comes near, read more, and sweep the vocabulary at last."""
    mended: set[Prompt] = set()
    _mend(lm, judge, reading, mended, _MENDED)
    for n_beams in _BEAMS[1:]:
        if judge.is_over:
            return
        judge.score(ranked_prompts(reading.reader, reading.white, n_beams=n_beams, lengths=reading.lengths))
        _mend(lm, judge, reading, mended, _MENDED)
    while not judge.is_over:
        before = len(judge.tried)
        _mend(lm, judge, reading, mended, 2 * _MENDED)
        judge.score(itertools.islice(swept(reading.reader, reading.white, judge.best), 1 << 14))
        if len(judge.tried) == before:  # all that is near was tried: every prompt one token away from another
            for prompt in judge.nearest(64):
                judge.score(swept(reading.reader, reading.white, prompt))
            return


def _unmix(
    lm: LanguageModel, judge: LastJudge, mixture: Mixture, lengths: range, *, n_beams: int, n_lasts: int
) -> None:
    """Seek the tokens that the state is a mixture of, behind each token that the prompt may end in."""
    state = judge.last_row
    inverse = ridge_inverse(lm, MIXED, judge.meter)
    for last in inverse.scores(inverse.rest(state[None]))[0].topk(min(n_lasts, lm.vocab_size)).indices.tolist():
        if judge.is_over:
            return
        heads = heads_of(lm, mixture, last, state, _blur(lm, judge.seen))
        if heads is None:
            continue
        for prompts in decoded(mixture, last, heads, lengths, n_beams=n_beams):
            judge.score(prompts)
            if judge.is_over:
                return


def _blur(lm: LanguageModel, seen: Observation) -> Tensor:
    """Return by how much arithmetic and rounding move each coordinate of the last row, one standard deviation. (W,)."""
    row = seen.states[-1].float()
    arithmetic = row.norm() / len(row) ** 0.5 * max(_BLUR, torch.finfo(lm.dtype).eps / 4)
    rounding = row.abs() * torch.finfo(getattr(torch, seen.dtype)).eps / 4  # half a step at most, evenly spread
    if seen.half_step is not None:
        rounding = torch.maximum(rounding, seen.half_step[-1].to(row) / 3**0.5)
    return rounding.clamp(min=float(arithmetic)).to(lm.device)


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
