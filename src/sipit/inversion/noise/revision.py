"""A decoded prompt with one token replaced, wherever that makes it likelier: what a beam search lost too early.

A beam search sees the rows one after the other. A token of which its own row tells little (a prompt's first, whose
state hardly differs from others') is lost before the rows that would speak for it. Here the whole prompt is there:
tokens are replaced one at a time, first judged by their row and the next, the best of them by more and more rows.
Shapes: T tokens of the prompt without its known prefix, N replacements, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.inversion.noise.beam_search import Beams
from sipit.inversion.noise.effort import Effort, effort_on
from sipit.inversion.noise.fast_passes import Passes, fast_passes, passes_behind
from sipit.inversion.noise.prior import log_probabilities_along, probabilities_behind
from sipit.models import LanguageModel, TruncatedModel
from sipit.models.packed_row import PackedRow, in_turn
from sipit.observations import Observation

_FIRST = 1024  # replacements judged of a prompt's first token
_THOROUGH = 512  # of each other, however unlikely, before a prompt is called probable
_LEAST = 1e-6  # posterior from which a token is worth a look otherwise
_SWEEPS = 4  # replacements made in turn
_MOST_GAIN = 50.0  # nats: more makes no difference, and would overflow


@dataclass(frozen=True, kw_only=True, eq=False)
class _Along:
    """A prompt in one row of a model, behind whose tokens replacements are run."""

    model: TruncatedModel
    row: PackedRow
    passes: Passes


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chains:
    """Replaced tokens with what follows them in the prompt. Q tokens in all."""

    of: Tensor  # (Q,) the replacement that each token belongs to
    places: Tensor  # (Q,) in the whole prompt
    values: Tensor  # (Q, W) at them


@dataclass(frozen=True, kw_only=True, eq=False)
class _Replacements:
    """Tokens that may be replaced. N of them."""

    rows: Tensor  # (N,) where
    tokens: Tensor  # (N,) by what

    def some(self, which: Tensor) -> _Replacements:
        """Return those of some indices, or of a mask."""
        return _Replacements(rows=self.rows[which], tokens=self.tokens[which])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Judged:
    """Replacements that were judged by all rows. N of them."""

    tried: _Replacements
    gains: Tensor  # (N,) float64: what each adds to the log-probability of prompt and rows
    worth: _Replacements  # those worth another look once one was made


class Revision:
    """Replaces tokens of one prompt.

    Args:
        lm: the model.
        seen: the rows, complete behind their known prefix.
        noise: what happened to them.
        meter: charged for every token run.
        effort: how many are tried.
    """

    def __init__(
        self, lm: LanguageModel, seen: Observation, noise: NoiseModel, meter: Meter, effort: Effort | None = None
    ) -> None:
        self._lm, self._noise, self._meter = lm, noise, meter
        self._effort = effort or effort_on(lm.device)
        self._n_known = len(seen.known_prefix)
        self._model = lm.cut(seen.cut, seq_len=seen.n_positions)
        self._full = lm.cut(lm.final_cut, seq_len=seen.n_positions)
        self._passes, self._fast = passes_behind(lm, seen.cut, noise, meter), fast_passes(lm)
        self._observed = seen.states.to(self._model.device).float()  # (T, W)
        self._known = torch.tensor(seen.known_prefix, dtype=torch.long)

    def likeliest(self, beams: Beams, *, is_thorough: bool = False) -> Tensor:
        """Return the best prompt of a search, with tokens replaced as long as that makes it likelier. (T,)."""
        best, halving = beams.input_ids[0], self._effort.halving
        left = self._replacements(best, beams.token_posteriors, is_thorough=is_thorough)
        for sweep in range(_SWEEPS):
            left = left.some(left.tokens != best[left.rows])
            judged = self._judged(best, left, halving if sweep == 0 else halving[1:])
            if not bool((judged.gains > 0).any()):
                break
            first = int(judged.gains.argmax())
            best = best.index_fill(0, judged.tried.rows[first], int(judged.tried.tokens[first]))
            left = judged.worth
        return best

    def beside(self, beams: Beams) -> float:
        """Return how likely replacements are that a search did not end with, over its best prompt: the sum of all."""
        best = beams.input_ids[0]
        judged = self._judged(best, self._replacements(best, beams.token_posteriors), self._effort.halving)
        rows, tokens = judged.tried.rows.tolist(), judged.tried.tokens.tolist()
        known = {tuple(prompt) for prompt in beams.input_ids.tolist()}
        sums = 0.0
        for row, token, gain in zip(rows, tokens, judged.gains.tolist(), strict=True):
            prompt = best.index_fill(0, torch.tensor([row]), token)
            if tuple(prompt.tolist()) not in known:
                sums += math.exp(min(gain, _MOST_GAIN))
        return sums

    def _replacements(self, prompt: Tensor, posteriors: Tensor, *, is_thorough: bool = False) -> _Replacements:
        """Return where tokens may be replaced, and by what: the likeliest of each position. (T,), (T, V)."""
        rows, tokens = [], []
        n_each, least = self._effort.n_replaced, _LEAST
        if is_thorough:
            n_each, least = max(n_each, _THOROUGH), 0.0
        for row, token in enumerate(prompt.tolist()):
            n = n_each if row or self._n_known else _FIRST
            others = posteriors[row].index_fill(0, torch.tensor([token]), 0.0)
            best = others.topk(min(n, len(others) - 1))
            found = best.indices[best.values >= least]
            tokens.append(found)
            rows.append(torch.full_like(found, row))
        return _Replacements(rows=torch.cat(rows), tokens=torch.cat(tokens))

    def _judged(self, prompt: Tensor, tried: _Replacements, halving: Sequence[tuple[int, int]]) -> _Judged:
        """Judge replacements by more and more rows, fewer each time, and those left by all. (T,)."""
        ids = torch.cat([self._known, prompt])
        before = log_probabilities_along(self._lm, ids, self._n_known, self._meter)  # (T, V)
        own = before[torch.arange(len(prompt)), prompt]  # (T,)
        own_row = _Along(model=self._model, row=self._model.row(ids), passes=self._passes)
        full_row = _Along(model=self._full, row=self._full.row(ids), passes=self._fast)
        states = self._model.ordinary(ids)[self._n_known :].float()
        likely = self._likelihoods(states, torch.arange(len(prompt)))  # (T,)
        self._meter.spend(2 * len(ids), self._model.layer)
        self._meter.spend(len(ids), self._full.layer)
        gains = before[tried.rows, tried.tokens] - own[tried.rows]  # (N,)
        worth: _Replacements | None = None
        for n_more, n_kept in halving:
            near = gains + self._likelihood_gains(own_row, ids, tried, likely, n_more)
            left = near.topk(min(n_kept, len(near))).indices
            tried, gains = tried.some(left), gains[left]
            worth = worth or tried
        gains = gains + self._likelihood_gains(own_row, ids, tried, likely, len(prompt))
        gains = gains + self._prior_gains(full_row, ids, tried, own)
        return _Judged(tried=tried, gains=gains, worth=worth or tried)

    def _likelihoods(self, states: Tensor, rows: Tensor) -> Tensor:
        """Return how likely rows are given their states. (N, W), (N,) → (N,) float64."""
        return self._noise.log_likelihood(self._observed[rows.to(self._observed.device)], states).cpu()

    def _likelihood_gains(
        self, along: _Along, ids: Tensor, tried: _Replacements, likely: Tensor, n_more: int
    ) -> Tensor:
        """Return what replacements add to the log-likelihood of their row and some more. (P + T,), (T,) → (N,)."""
        gains = torch.zeros(len(tried.rows), dtype=torch.float64)
        for chains in self._chains(along, ids, tried, n_more):
            at = chains.places - self._n_known
            gains.index_add_(0, chains.of, self._likelihoods(chains.values.float(), at) - likely[at])
        return gains

    def _prior_gains(self, along: _Along, ids: Tensor, tried: _Replacements, own: Tensor) -> Tensor:
        """Return what replacements add to the log-probability of the tokens behind them. (P + T,), (T,) → (N,)."""
        gains = torch.zeros(len(tried.rows), dtype=torch.float64)
        for chains in self._chains(along, ids, tried, len(ids)):
            goes_on = chains.places + 1 < len(ids)
            after = chains.places[goes_on] + 1
            with self._fast():
                behind = probabilities_behind(self._lm, chains.values[goes_on.to(chains.values.device)]).cpu()
            found = behind[torch.arange(len(after)), ids[after]].double().log()
            gains.index_add_(0, chains.of[goes_on], found - own[after - self._n_known])
        return gains

    def _chains(self, along: _Along, ids: Tensor, tried: _Replacements, n_more: int) -> Iterator[_Chains]:
        """Run replacements and up to n_more tokens behind each, in passes that hold some of them."""
        first = tried.rows + self._n_known
        lengths = (len(ids) - first).clamp(max=1 + n_more)  # (N,)
        begin = 0
        while begin < len(first):
            end = begin + max(1, int((lengths[begin:].cumsum(dim=0) <= self._effort.max_batch).sum()))
            of = torch.arange(begin, end).repeat_interleave(lengths[begin:end])  # (Q,)
            starts = lengths[begin:end].cumsum(dim=0) - lengths[begin:end]
            steps = torch.arange(len(of)) - starts[of - begin]  # (Q,) behind the replaced token
            places = first[of] + steps
            packed = torch.where(steps == 0, tried.tokens[of], ids[places])
            continues = torch.arange(len(ids))[None] < first[of][:, None]  # (Q, P)
            attends = in_turn(len(of)) & (of[:, None] == of[None])
            with along.passes():
                values = along.row.run(packed, places, attends, continues=continues)
            self._meter.spend(len(of), along.model.layer)
            yield _Chains(of=of, places=places, values=values)
            begin = end
