"""Beam search for the prompts that are most probable under a noise model and the language model.

At each position the tokens of all beams compete: the best by prior and token map are run through the model, and the
beams that go on are the best by prior and the exact likelihood of all rows so far. A beam that a later row speaks
against loses to another one: so later rows revise earlier tokens. Shapes: B beams, N candidates, V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.judging.meter import Meter
from sipit.inversion.noise.noise_model import NoiseModel
from sipit.inversion.noise.posterior import Candidates, TokenPosteriors
from sipit.inversion.noise.prefixes import BeamPrefixes
from sipit.inversion.noise.prior import TokenPrior, anywhere_log_probabilities
from sipit.inversion.noise.token_map import Ranking, TokenMap, first_map, first_states, token_maps
from sipit.models import LanguageModel
from sipit.observations import Observation

_TEMPER = 0.8  # of the log-likelihoods of the token map: its errors are less regular than a normal law's
_ROWS = 4096  # of candidates compared at once
_LEAST = 128  # candidates run at a position, however sure the ranking is
_LEFT_OUT = 1e-4  # of the mass at a position: beams and candidates beyond it are not worth their price


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much a decoding may cost."""

    n_beams: int = 64
    n_candidates: int = 768  # run through the model at each position, over all beams
    n_first: int = 1024  # run at the first position, twice, where the whole vocabulary costs too much
    first_block_tokens: int = 2_000_000  # that it may cost, once per model and cut
    max_batch: int = 256  # in one packed pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Beams:
    """The prompts that were left at the end, the most probable first. B of them, of T tokens."""

    input_ids: Tensor  # (B, T)
    posteriors: Tensor  # (B,) float64: of each prompt, the mass of what was left out on the way counted
    token_posteriors: Tensor  # (T, V) float64: of each token at each position; sums to 1 over V


class BeamSearch:
    """One search, position by position.

    Args:
        lm: the model.
        seen: the rows, complete behind their known prefix.
        noise: what happened to them.
        meter: charged for every token run.
        effort: how much it may cost.
    """

    def __init__(
        self, lm: LanguageModel, seen: Observation, noise: NoiseModel, meter: Meter, effort: Effort | None = None
    ) -> None:
        self._lm, self._noise, self._meter = lm, noise, meter
        self._effort = effort or Effort()
        self._model = lm.cut(seen.cut, seq_len=seen.n_positions)
        self._observed = seen.states.to(self._model.device).float()  # (T, W)
        known = torch.tensor(seen.known_prefix, dtype=torch.long)
        batch = self._effort.max_batch
        self._maps = token_maps(lm, seen.cut, meter)
        self._prefixes = BeamPrefixes(self._model, known, max_batch=batch)
        self._prior = TokenPrior(lm, known, meter, max_batch=batch, seq_len=seen.n_positions)
        self._clean = self._maps.compared(noise.unexpected(self._observed))  # (T, S)
        self._ranking: Ranking | None = None
        self._seen = seen
        self._unigram = anywhere_log_probabilities(lm, meter).double().cpu()  # (V,)
        self._local: list[Tensor] = []  # (V,) log-probabilities at each row by that row alone

    def run(self) -> Beams:
        """Return the prompts that are left."""
        n_rows = len(self._observed)
        scores = torch.zeros(1, dtype=torch.float64)  # (B,)
        tokens = torch.zeros(1, 0, dtype=torch.long)  # (B, t)
        posteriors = TokenPosteriors(n_rows, self._lm.vocab_size)
        for row in range(n_rows):
            found = self._candidates(row, scores)
            kept = self._kept(found)
            posteriors.leave_out(row, tokens, found, kept)
            token_ids, beams, scores = found.token_ids[kept], found.beams[kept], found.log_scores[kept]
            tokens = torch.cat([tokens[beams], token_ids[:, None]], dim=1)
            if row + 1 < n_rows:
                self._prefixes.grow(token_ids, beams)
                self._meter.spend(len(kept), self._model.layer)
                self._prior.grow(token_ids, beams)
        shares = (scores - scores.logsumexp(dim=0)).exp() * posteriors.left  # (B,)
        return Beams(
            input_ids=tokens, posteriors=shares, token_posteriors=posteriors.ended(tokens, shares, self._local)
        )

    def _kept(self, found: Candidates) -> Tensor:
        """Return the candidates that become beams: the best, until little mass is left. (B',)."""
        ordered = found.log_scores.sort(descending=True, stable=True)
        shares = (ordered.values - ordered.values.logsumexp(dim=0)).exp()
        enough = int((shares.cumsum(dim=0) < 1 - _LEFT_OUT).sum()) + 1
        return ordered.indices[: min(enough, self._effort.n_beams)]

    def _candidates(self, row: int, scores: Tensor) -> Candidates:
        """Return the best continuations of all beams at one row, with their exact scores."""
        prior = self._prior.log_probabilities.double().cpu() + scores[:, None]  # (B, V)
        if self._prefixes.position == 0:
            return self._first_candidates(prior)
        likelihoods = self._rest_ranking().scores(self._clean[row][None]).double().cpu()  # (1, V)
        self._local.append((_TEMPER * likelihoods[0] + self._unigram).log_softmax(dim=0))
        ranked = prior + _TEMPER * likelihoods
        chosen = _best(ranked, self._effort.n_candidates)
        return self._judged(row, prior, ranked, *chosen)

    def _first_candidates(self, prior: Tensor) -> Candidates:
        """Return candidates for the first position: the whole vocabulary, or where it costs too much the likeliest."""
        maps, keys, vocabulary = self._maps, self._maps.keys, torch.arange(self._lm.vocab_size)
        if len(vocabulary) * self._model.layer <= self._effort.first_block_tokens:
            states = first_states(self._lm, self._seen.cut, self._meter)
            likelihoods = self._likelihoods(0, states)
            self._local.append((_TEMPER * likelihoods + self._unigram).log_softmax(dim=0))
            ids, beams = _best(prior + likelihoods, len(vocabulary))
            exact = (prior[0] + likelihoods)[ids]
            others = (prior + likelihoods).index_fill(1, ids, -math.inf)
            rest = others.flatten().logsumexp(dim=0)
            return Candidates(token_ids=ids, beams=beams, log_scores=exact, log_rest=rest, log_others=others)
        ranked = prior + _TEMPER * self._ranked(maps.first).scores(self._clean[:1]).double().cpu()
        ids, beams = _best(ranked, self._effort.n_first)
        rows = maps.compared(self._states(ids, beams))
        likelihoods = self._ranked(first_map(rows, keys.keys(ids).to(rows))).scores(self._clean[:1]).double().cpu()
        self._local.append((_TEMPER * likelihoods[0] + self._unigram).log_softmax(dim=0))
        again = prior + _TEMPER * likelihoods
        unseen = again.clone()
        unseen[beams, ids] = -math.inf
        more = _best(unseen, self._effort.n_first)
        return self._judged(0, prior, again, torch.cat([ids, more[0]]), torch.cat([beams, more[1]]))

    def _judged(self, row: int, prior: Tensor, ranked: Tensor, ids: Tensor, beams: Tensor) -> Candidates:
        """Return candidates with exact scores, and the mass of all others as the ranking sees it."""
        states = self._states(ids, beams)
        exact = prior[beams, ids] + self._likelihoods(row, states)  # (N,)
        share = ranked[beams, ids].logsumexp(dim=0) - ranked.flatten().logsumexp(dim=0)  # of those run, in log
        unseen = torch.log1p(-share.exp().clamp(max=1 - 1e-12)) - share
        log_rest = exact.logsumexp(dim=0) + unseen
        others = ranked.clone()
        others[beams, ids] = -math.inf
        return Candidates(token_ids=ids, beams=beams, log_scores=exact, log_rest=log_rest, log_others=others)

    def _likelihoods(self, row: int, states: Tensor) -> Tensor:
        """Return the log-likelihood of a row for each of some states. (N, W) → (N,) float64."""
        observed = self._observed[row]
        parts = [self._noise.log_likelihood(observed.expand_as(part), part) for part in states.split(_ROWS)]
        return torch.cat(parts).cpu()

    def _states(self, ids: Tensor, beams: Tensor) -> Tensor:
        states = self._prefixes.states(ids, beams).float()
        self._meter.spend(len(ids), self._model.layer)
        self._meter.n_checked += len(ids)
        return states

    def _rest_ranking(self) -> Ranking:
        if self._ranking is None:
            self._ranking = self._ranked(self._maps.rest)
        return self._ranking

    def _ranked(self, token_map: TokenMap) -> Ranking:
        variance = torch.full_like(token_map.mean, (self._noise.sigma / self._noise.scale) ** 2)
        return Ranking(self._maps, token_map, variance)


def _best(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the tokens and beams of the highest scores: n, or fewer that hold nearly all mass. (B, V) → (n,), (n,)."""
    best = scores.flatten().topk(min(n, scores.numel()))
    shares = (best.values - scores.flatten().logsumexp(dim=0)).exp()
    enough = max(_LEAST, int((shares.cumsum(dim=0) < 1 - _LEFT_OUT).sum()) + 1)
    places = best.indices[:enough]
    return places % scores.shape[1], places // scores.shape[1]
