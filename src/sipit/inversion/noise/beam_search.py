"""Beam search for the prompts that are most probable under a noise model and the language model.

At each position the tokens of all beams compete: the best by prior and token map are run through the model, and the
beams that go on are the best by prior and the exact likelihood of all rows so far. A beam that a later row speaks
against loses to another one: so later rows revise earlier tokens. Shapes: B beams, N candidates, M likely
tokens, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.judging.directions import SHARES, Along, directions
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.inversion.noise.effort import Effort, effort_on
from sipit.inversion.noise.fast_passes import passes_behind
from sipit.inversion.noise.posterior import Candidates, TokenPosteriors, Unrun
from sipit.inversion.noise.prefixes import BeamPrefixes
from sipit.inversion.noise.prior import TokenPrior, anywhere_probabilities
from sipit.inversion.noise.token_map import first_rows_of_all, token_map
from sipit.inversion.noise.token_ranking import Shown, TokenRanking, with_unmapped
from sipit.models import LanguageModel
from sipit.observations import Observation

_TEMPER = (
    0.8  # of the map's log-likelihoods before its offset is known: its errors are less regular than a normal law's
)
_ROWS = 4096  # of candidates compared at once
_OF_EACH = 3  # tokens run behind every beam, to know the map's offset there
_LIKELY, _EXPECTED = 6144, 2048  # tokens, by map and prior and by the prior alone, that are ranked at a position
_TEACHERS = 512  # tokens run, those whose rows are nearest, that others' errors are learned from where nothing fits
_OWN_TEACHERS = 256  # the same behind the best beam, whatever other beams hold
_SURPRISE = 2.2  # standard deviations that the best state leaves too much along tokens' directions where nothing fits
_COMPARED = 128  # tokens run, the first ones, that show these directions
_DOUBTED = (
    0.3  # of the prior's log-probabilities, by which a third of the candidates is chosen: an early token may be wrong
)
_OF_ALL = 2048  # the best of them, where the whole vocabulary was run behind one beam
_LEAST = 32  # candidates run at a position, however sure the ranking is
_LEFT_OUT = 1e-4  # of the mass at a position: beams and candidates beyond it are not worth their price

OnPosition = Callable[[Sequence[int]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Beams:
    """The prompts that were left at the end, the most probable first. B of them, of T tokens."""

    input_ids: Tensor  # (B, T)
    posteriors: Tensor  # (B,) float64: of each prompt, the mass of what was left out on the way counted
    token_posteriors: Tensor  # (T, V) float64: of each token at each position; sums to 1 over V
    distances: list[dict[int, float]]  # T of: token run at a position → L2 to the row, the least behind any beam


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ahead:
    """What the language model says of a position behind every beam."""

    prior: Tensor  # (B, V) probabilities
    scores: Tensor  # (B,) float64 log-scores of the beams
    tokens: Tensor  # (B, t) of the beams
    unigram: Tensor  # (V,) log-probabilities of tokens anywhere

    @property
    def best(self) -> int:
        """The beam of the highest score."""
        return int(self.scores.argmax())

    @cached_property
    def shares(self) -> Tensor:
        """Of the beams. (B,)."""
        return self.scores.softmax(dim=0)

    @cached_property
    def mean(self) -> Tensor:
        """Log-probability of every token behind all beams. (V,)."""
        return (self.shares.float() @ self.prior).double().log()

    @cached_property
    def expected(self) -> Tensor:
        """Log-probability of every token here, were an early one wrong. (V,)."""
        return torch.logaddexp(self.mean, self.unigram)

    def behind(self, token_ids: Tensor) -> Tensor:
        """Return the log-scores of tokens behind every beam before their row is looked at. (M,) → (B, M)."""
        return self.prior[:, token_ids].double().log() + self.scores[:, None]

    def of(self, shown: Shown) -> Tensor:
        """Return them for tokens that were run. (N,)."""
        return self.prior[shown.beams, shown.token_ids].double().log() + self.scores[shown.beams]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ranked:
    """Likely tokens of a position as they were ranked, and the map's word on all."""

    token_ids: Tensor  # (M,), ascending
    log_prior: Tensor  # (B, M) with the scores of the beams
    likelihoods: Tensor  # (B, M) float64
    by_map: Tensor  # (V,) float64 log-likelihoods

    def unrun(self, ahead: _Ahead, shown: Shown, exact: Tensor) -> Unrun:
        """Return what was not run, on the scale of the exact scores of what was: (N,).

        Both the ranking and the map are off by what they are off for the tokens that were run.
        """
        scores, at = self.log_prior + self.likelihoods, torch.searchsorted(self.token_ids, shown.token_ids)
        off = exact.logsumexp(dim=0) - scores[shown.beams, at].logsumexp(dim=0)
        by_map = ahead.of(shown) + self.by_map[shown.token_ids]  # (N,)
        map_off = exact.logsumexp(dim=0) - by_map.logsumexp(dim=0)
        scores[shown.beams, at] = -math.inf
        elsewhere = ahead.mean + ahead.scores.logsumexp(dim=0) + self.by_map
        return Unrun(
            token_ids=self.token_ids,
            log_scores=scores + off,
            log_elsewhere=elsewhere.index_fill(0, self.token_ids, -math.inf) + map_off,
            beam_shares=ahead.shares,
        )


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
        self._effort = effort or effort_on(lm.device)
        self._model = lm.cut(seen.cut, seq_len=seen.n_positions)
        self._observed = seen.states.to(self._model.device).float()  # (T, W)
        self._known = torch.tensor(seen.known_prefix, dtype=torch.long)
        batch = self._effort.max_batch
        self._map = token_map(lm, seen.cut, meter)
        self._passes = passes_behind(lm, seen.cut, noise, meter)
        self._prefixes = BeamPrefixes(self._model, self._known, max_batch=batch, passes=self._passes)
        self._prior = TokenPrior(lm, self._known, meter, max_batch=batch, seq_len=seen.n_positions)
        self._clean = self._map.compared(self._filled())  # (T, S)
        self._ranking = TokenRanking(self._map, noise.variances(seen.d_model))
        self._seen = seen
        self._unigram = anywhere_probabilities(lm, meter).cpu().double().log()  # (V,)
        self._n_surprised = self._effort.n_surprised
        self._distances: list[dict[int, float]] = []
        self._local: list[Tensor] = []  # (V,) log-probabilities at each row by that row alone

    def _filled(self) -> Tensor:
        """Return the rows without shift and scale, the mean row's values where coordinates were dropped. (T, W)."""
        clean, noise = self._noise.unexpected(self._observed), self._noise
        if not noise.drops or self._map.projection is not None:
            return clean
        return torch.where(noise.kept(self._observed), clean, self._map.centre.to(clean))

    def run(self, on_position: OnPosition | None = None, *, hint: Tensor | None = None) -> Beams:
        """Return the prompts that are left.

        Args:
            on_position: told the best tokens so far after every position.
            hint: (T,) a prompt that is followed to the end, however unlikely its beginning is.
        """
        n_rows = len(self._observed)
        scores = torch.zeros(1, dtype=torch.float64)  # (B,)
        tokens = torch.zeros(1, 0, dtype=torch.long)  # (B, t)
        posteriors = TokenPosteriors(n_rows, self._lm.vocab_size)
        followed = 0  # the beam that is the hint so far
        for row in range(n_rows):
            wanted = None if hint is None else (int(hint[row]), followed)
            found = self._candidates(row, scores, tokens, wanted)
            kept = self._kept(found)
            if wanted is not None:
                place = int(((found.token_ids == wanted[0]) & (found.beams == wanted[1])).nonzero()[0, 0])
                kept = kept if bool((kept == place).any()) else torch.cat([kept, torch.tensor([place])])
                followed = int((kept == place).nonzero()[0, 0])
            posteriors.leave_out(row, tokens, found, kept)
            token_ids, beams, scores = found.token_ids[kept], found.beams[kept], found.log_scores[kept]
            tokens = torch.cat([tokens[beams], token_ids[:, None]], dim=1)
            if on_position is not None:
                on_position(tokens[0].tolist())
            if row + 1 < n_rows:
                self._prefixes.grow(token_ids, beams)
                self._meter.spend(len(kept), self._model.layer)
                self._prior.grow(token_ids, beams)
        shares = (scores - scores.logsumexp(dim=0)).exp() * posteriors.left  # (B,)
        return Beams(
            input_ids=tokens,
            posteriors=shares,
            token_posteriors=posteriors.ended(tokens, shares, self._local),
            distances=self._distances,
        )

    def _kept(self, found: Candidates) -> Tensor:
        """Return the candidates that become beams: the best, until little mass is left. (B',)."""
        ordered = found.log_scores.sort(descending=True, stable=True)
        shares = (ordered.values - ordered.values.logsumexp(dim=0)).exp()
        enough = int((shares.cumsum(dim=0) < 1 - _LEFT_OUT).sum()) + 1
        return ordered.indices[: min(enough, self._effort.n_beams)]

    def _candidates(self, row: int, scores: Tensor, tokens: Tensor, wanted: tuple[int, int] | None) -> Candidates:
        """Return the best continuations of all beams at one row, with their exact scores.

        Args:
            row: which.
            scores: (B,) of the beams.
            tokens: (B, t) of theirs.
            wanted: a token and its beam that are among them in any case.
        """
        prior = self._prior.probabilities.cpu()  # (B, V)
        if self._prefixes.position == 0:
            return self._first_candidates(prior[0].double().log() + scores, wanted)
        ahead = _Ahead(prior=prior, scores=scores, tokens=tokens, unigram=self._unigram)
        shown, ranked = self._run_likely(row, ahead, wanted)
        alone = ranked.by_map + ahead.expected
        alone[ranked.token_ids] = ranked.likelihoods[0] + ahead.expected[ranked.token_ids]
        self._local.append(alone.log_softmax(dim=0))
        shown, fits, ranked = self._run_where_nothing_fits(row, ahead, shown, ranked)
        self._note_distances(row, shown.token_ids, shown.states)
        exact = ahead.of(shown) + fits  # (N,)
        return Candidates(
            token_ids=shown.token_ids, beams=shown.beams, log_scores=exact, unrun=ranked.unrun(ahead, shown, exact)
        )

    def _run_likely(self, row: int, ahead: _Ahead, wanted: tuple[int, int] | None) -> tuple[Shown, _Ranked]:
        """Run the likeliest tokens of a row, each time ranked by those before; and return the last ranking. (V,)."""
        expected = ahead.expected
        guessed = expected + _TEMPER * self._ranking.at_first(self._clean[row]).cpu().double()  # (V,)
        also = torch.tensor((wanted or ())[:1], dtype=torch.long)
        likely = torch.cat([_top(guessed, _LIKELY), _top(expected, _EXPECTED), also]).unique()  # (M,)
        logs = ahead.behind(likely)  # (B, M)
        at, beams = _best_of_each(logs + (guessed - expected)[likely], _OF_EACH, self._effort.n_shown)
        shown = self._run(ahead, *_with(wanted, likely[at], beams))
        if self._effort.whole == "always":
            return self._run_whole_vocabulary(row, ahead, shown)
        for n in self._effort.n_candidates:
            teachers, likelihoods = shown, self._sharpened(row, shown, likely)
            shown = shown.and_more(self._run(ahead, *_more(likely, logs, likelihoods, shown, n)))
        by_map = self._by_map(row, teachers, ahead.shares)
        return shown, _Ranked(token_ids=likely, log_prior=logs, likelihoods=likelihoods, by_map=by_map)

    def _run_whole_vocabulary(self, row: int, ahead: _Ahead, shown: Shown) -> tuple[Shown, _Ranked]:
        """Run all tokens behind the best beam, and those that are likely then behind others.

        What a token's row is behind the best beam tells more of it behind another than the map does.
        """
        shown, by_best = self._and_whole_vocabulary(row, ahead, shown)
        likely = torch.cat([_top(by_best + ahead.expected, _LIKELY), shown.token_ids]).unique()  # (M,)
        logs = ahead.behind(likely)  # (B, M)
        for n in self._effort.n_candidates:
            teachers = _nearest(ahead, shown, self._likelihoods(row, shown.states))
            likelihoods = self._sharpened(row, teachers, likely)
            shown = shown.and_more(self._run(ahead, *_more(likely, logs, likelihoods, shown, n)))
        return shown, _Ranked(token_ids=likely, log_prior=logs, likelihoods=likelihoods, by_map=by_best)

    def _and_whole_vocabulary(self, row: int, ahead: _Ahead, shown: Shown) -> tuple[Shown, Tensor]:
        """Run all tokens behind the best beam; return the best with those run before, and how each fits. (V,)."""
        best, ids = ahead.best, torch.arange(self._lm.vocab_size)
        with self._passes():
            alone = self._model.row(torch.cat([self._known, ahead.tokens[best]]))
            places = torch.full((self._effort.max_batch,), self._prefixes.position)
            parts = [alone.run(part, places[: len(part)]).float() for part in ids.split(self._effort.max_batch)]
        states = torch.cat(parts)  # (V, W)
        self._meter.spend(len(ids) + self._prefixes.position, self._model.layer)
        self._meter.n_checked += len(ids)
        fits = self._likelihoods(row, states)  # (V,)
        left = fits + ahead.prior[best].double().log()
        left[shown.token_ids[shown.beams == best]] = -math.inf
        ids = _top(left, min(_OF_ALL, int(left.isfinite().sum())))
        more = Shown(
            token_ids=ids, beams=torch.full_like(ids, best), states=states[ids.to(states.device)], n_beams=shown.n_beams
        )
        return shown.and_more(more), fits

    def _run_where_nothing_fits(
        self, row: int, ahead: _Ahead, shown: Shown, ranked: _Ranked
    ) -> tuple[Shown, Tensor, _Ranked]:
        """Run more tokens behind the best beam while no state explains the row, and return their likelihoods. (N,)."""
        fits = self._likelihoods(row, shown.states)  # (N,)
        if self._effort.whole == "always":
            return shown, fits, ranked
        n_left = min(self._n_surprised, self._effort.n_at_one)
        while self._is_surprising(row, shown, int((ahead.of(shown) + fits).argmax())):
            if self._effort.whole == "in doubt":
                shown, ranked = self._run_whole_vocabulary(row, ahead, shown)
                return shown, self._likelihoods(row, shown.states), ranked
            if n_left == 0:
                self._n_surprised = 0
                break
            ranked, ids = self._more_behind_the_best(row, ahead, shown, fits)
            ids = ids[: min(self._effort.n_more, n_left)]
            if len(ids) == 0:
                break
            n_left, self._n_surprised = n_left - len(ids), self._n_surprised - len(ids)
            more = self._run(ahead, ids, torch.full_like(ids, ahead.best))
            shown, fits = shown.and_more(more), torch.cat([fits, self._likelihoods(row, more.states)])
        return shown, fits, ranked

    def _more_behind_the_best(self, row: int, ahead: _Ahead, shown: Shown, fits: Tensor) -> tuple[_Ranked, Tensor]:
        """Rank tokens anew, and return those not run behind the best beam, the likeliest first. (N,), (M,)."""
        best, teachers = ahead.best, _nearest(ahead, shown, fits)
        by_map = self._by_map(row, teachers, F.one_hot(torch.tensor(best), len(ahead.scores)))
        likely = torch.cat([_top(by_map, _LIKELY), shown.token_ids]).unique()
        logs, likelihoods = ahead.behind(likely), self._sharpened(row, teachers, likely)
        left = (logs + with_unmapped(likelihoods))[best]  # (M,)
        left[torch.searchsorted(likely, shown.token_ids[shown.beams == best])] = -math.inf
        ordered = left.topk(int(left.isfinite().sum())).indices
        return _Ranked(token_ids=likely, log_prior=logs, likelihoods=likelihoods, by_map=by_map), likely[ordered]

    def _sharpened(self, row: int, teachers: Shown, likely: Tensor) -> Tensor:
        """Return log-likelihoods of a row for likely tokens behind every beam. (M,) → (B, M) float64."""
        return self._ranking.sharpened(self._clean[row], teachers, likely).cpu().double()

    def _by_map(self, row: int, teachers: Shown, weights: Tensor) -> Tensor:
        """Return those of all tokens behind beams of some weights. (B,) → (V,) float64."""
        return self._ranking.by_map(self._clean[row], teachers, weights).cpu().double()

    def _is_surprising(self, row: int, shown: Shown, best: int) -> bool:
        """Whether even the best state leaves more of a row than the noise explains: the right token was not run.

        Looked at where the states of tokens differ there, for elsewhere a token that is missed leaves nothing, but the
        noise its own.
        """
        state = shown.states[best]
        kept = self._noise.kept(self._observed[row][None])  # (1, W)
        spread = self._noise.variances(len(state)).to(state).sqrt() * abs(self._noise.scale)
        z = as_float64((self._observed[row] - self._noise.expected(state[None])) * kept / spread)
        apart = as_float64((shown.states[:_COMPARED] - state) * kept / spread)  # (N, W)
        sets = directions(apart, SHARES)
        return max(float(Along.of(z, kept, each).deviations()) for each in sets) > _SURPRISE

    def _first_candidates(self, prior: Tensor, wanted: tuple[int, int] | None) -> Candidates:
        """Return candidates for a prompt's first position: the whole vocabulary, whose rows there are made once."""
        states = first_rows_of_all(self._lm, self._seen.cut, self._meter)
        likelihoods = self._likelihoods(0, states)  # (V,)
        self._local.append((likelihoods + self._unigram).log_softmax(dim=0))
        scores = (prior + likelihoods)[None]  # (1, V)
        ids, beams = _with(wanted, *_best(scores, scores.flatten().logsumexp(dim=0), self._lm.vocab_size))
        self._note_distances(0, ids, states[ids.to(states.device)])
        unrun = Unrun(
            token_ids=torch.arange(len(prior)),
            log_scores=scores.index_fill(1, ids, -math.inf),
            log_elsewhere=torch.full_like(prior, -math.inf),
            beam_shares=torch.ones(1, dtype=torch.float64),
        )
        return Candidates(token_ids=ids, beams=beams, log_scores=scores[0, ids], unrun=unrun)

    def _note_distances(self, row: int, ids: Tensor, states: Tensor) -> None:
        """Note how far the row lies from what tokens lead to, the nearest behind any beam. (N,), (N, W)."""
        found: dict[int, float] = {}
        distances = (self._noise.expected(states) - self._observed[row]).norm(dim=1)  # (N,)
        for token_id, distance in zip(ids.tolist(), distances.tolist(), strict=True):
            found[token_id] = min(distance, found.get(token_id, math.inf))
        self._distances.append(found)

    def _likelihoods(self, row: int, states: Tensor) -> Tensor:
        """Return the log-likelihood of a row for each of some states. (N, W) → (N,) float64."""
        observed = self._observed[row]
        parts = [self._noise.log_likelihood(observed.expand_as(part), part) for part in states.split(_ROWS)]
        return torch.cat(parts).cpu()

    def _run(self, ahead: _Ahead, ids: Tensor, beams: Tensor) -> Shown:
        """Run tokens behind beams. (N,), (N,)."""
        states = self._prefixes.states(ids, beams).float() if len(ids) else self._observed[:0]
        self._meter.spend(len(ids), self._model.layer)
        self._meter.n_checked += len(ids)
        return Shown(token_ids=ids, beams=beams, states=states, n_beams=len(ahead.scores))


def _top(scores: Tensor, n: int) -> Tensor:
    """Return the places of the n highest scores. (V,) → (n,)."""
    return scores.topk(min(n, len(scores))).indices


def _nearest(ahead: _Ahead, shown: Shown, fits: Tensor) -> Shown:
    """Return the tokens run whose rows are nearest: behind the best beam, behind any, and a few behind each. (N,)."""
    order = fits.argsort(descending=True)
    places = F.one_hot(shown.beams[order], shown.n_beams).cumsum(dim=0)  # (N, B) among those of each beam
    of_each = order[places.gather(1, shown.beams[order][:, None])[:, 0] <= _OF_EACH]
    own = order[shown.beams[order] == ahead.best][:_OWN_TEACHERS]
    return shown.some(torch.cat([own, order[:_TEACHERS], of_each]).unique())


def _more(likely: Tensor, logs: Tensor, likelihoods: Tensor, shown: Shown, n: int) -> tuple[Tensor, Tensor]:
    """Return up to n tokens and their beams beside those run, as many by each of three rankings. (M,), (B, M)."""
    rankings = logs + likelihoods, logs + with_unmapped(likelihoods), _DOUBTED * logs + likelihoods
    at = torch.searchsorted(likely, shown.token_ids)
    chosen = torch.zeros_like(logs, dtype=torch.bool)
    for scores in rankings:
        left = scores.clone()
        left[shown.beams, at] = -math.inf
        more_at, more_beams = _best(left, scores.flatten().logsumexp(dim=0), n // len(rankings))
        chosen[more_beams, more_at] = True
    places = chosen.flatten().nonzero()[:, 0]
    return likely[places % chosen.shape[1]], places // chosen.shape[1]


def _best(scores: Tensor, total: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return columns and beams of the highest scores: n, or fewer that leave little mass. (B, M) → (n,), (n,)."""
    best = scores.flatten().topk(min(n, int(scores.isfinite().sum())))
    shares = (best.values - total).exp()
    left = (scores.flatten().logsumexp(dim=0) - total).exp()
    enough = max(_LEAST, int((left - shares.cumsum(dim=0) > _LEFT_OUT).sum()) + 1)
    places = best.indices[:enough]
    return places % scores.shape[1], places // scores.shape[1]


def _best_of_each(scores: Tensor, n_each: int, n: int) -> tuple[Tensor, Tensor]:
    """Return columns and beams of the n highest scores and of the n_each highest of every beam. (B, M)."""
    own = scores.topk(min(n_each, scores.shape[1]), dim=1).indices  # (B, n_each)
    own = own + torch.arange(len(scores))[:, None] * scores.shape[1]
    places = torch.cat([own.flatten(), scores.flatten().topk(min(n, scores.numel())).indices]).unique()
    return places % scores.shape[1], places // scores.shape[1]


def _with(wanted: tuple[int, int] | None, ids: Tensor, beams: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and beams, a wanted pair among them. (N,), (N,)."""
    if wanted is None or bool(((ids == wanted[0]) & (beams == wanted[1])).any()):
        return ids, beams
    return torch.cat([ids, torch.tensor(wanted[:1])]), torch.cat([beams, torch.tensor(wanted[1:])])
