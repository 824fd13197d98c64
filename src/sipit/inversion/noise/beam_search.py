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

import torch
import torch.nn.functional as F
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
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
_MORE = 256  # tokens run at a time where nothing fits
_TEACHERS = 512  # tokens run, those whose rows are nearest, that others' errors are learned from where nothing fits
_SURPRISE = 4.0  # standard deviations that the best state's residual is too large by where nothing fits
_DOUBTED = (
    0.3  # of the prior's log-probabilities, by which a third of the candidates is chosen: an early token may be wrong
)
_LEAST = 32  # candidates run at a position, however sure the ranking is
_LEFT_OUT = 1e-4  # of the mass at a position: beams and candidates beyond it are not worth their price

OnPosition = Callable[[Sequence[int]], None]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much a decoding may cost."""

    n_beams: int = 64
    n_shown: int = 96  # tokens run at each position to know what the map misses there
    n_candidates: tuple[int, ...] = (128, 256)  # more that are run in turn, the likeliest over all beams
    n_surprised: int = 4096  # run in all at positions where nothing fits
    max_batch: int = 256  # in one packed pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Beams:
    """The prompts that were left at the end, the most probable first. B of them, of T tokens."""

    input_ids: Tensor  # (B, T)
    posteriors: Tensor  # (B,) float64: of each prompt, the mass of what was left out on the way counted
    token_posteriors: Tensor  # (T, V) float64: of each token at each position; sums to 1 over V
    distances: list[dict[int, float]]  # T of: token run at a position → L2 to the row, the least behind any beam


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
        self._map = token_map(lm, seen.cut, meter)
        passes = passes_behind(lm, seen.cut, noise, meter)
        self._prefixes = BeamPrefixes(self._model, known, max_batch=batch, passes=passes)
        self._prior = TokenPrior(lm, known, meter, max_batch=batch, seq_len=seen.n_positions)
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
            found = self._candidates(row, scores, wanted)
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

    def _candidates(self, row: int, scores: Tensor, wanted: tuple[int, int] | None) -> Candidates:
        """Return the best continuations of all beams at one row, with their exact scores.

        Args:
            row: which.
            scores: (B,) of the beams.
            wanted: a token and its beam that are among them in any case.
        """
        prior = self._prior.probabilities.cpu()  # (B, V)
        if self._prefixes.position == 0:
            return self._first_candidates(prior[0].double().log() + scores, wanted)
        clean, total = self._clean[row], scores.logsumexp(dim=0)
        shares = (scores - total).exp()  # (B,) of the beams
        mean = (shares.float() @ prior).double().log()  # (V,) behind all beams
        expected = torch.logaddexp(mean, self._unigram)
        guessed = expected + _TEMPER * self._ranking.at_first(clean).cpu().double()  # (V,)
        likely = torch.cat([_top(guessed, _LIKELY), _top(expected, _EXPECTED), torch.tensor((wanted or ())[:1]).long()])
        likely = likely.unique()  # (M,), ascending
        logs = prior[:, likely].double().log() + scores[:, None]  # (B, M)
        at, beams = _best_of_each(logs + (guessed - expected)[likely], _OF_EACH, self._effort.n_shown)
        ids, beams = _with(wanted, likely[at], beams)
        states = self._states(ids, beams)
        for n in self._effort.n_candidates:
            shown = Shown(token_ids=ids, beams=beams, states=states, n_beams=len(prior))
            likelihoods = self._ranking.sharpened(clean, shown, likely).cpu().double()
            ranked = logs + likelihoods  # (B, M)
            rankings = ranked, logs + with_unmapped(likelihoods), _DOUBTED * logs + likelihoods
            at, new_beams = _more(rankings, torch.searchsorted(likely, ids), beams, n)
            ids, beams = torch.cat([ids, likely[at]]), torch.cat([beams, new_beams])
            states = torch.cat([states, self._states(likely[at], new_beams)])
        by_map = self._ranking.by_map(clean, shown, shares).cpu().double()  # (V,)
        alone = (by_map + expected).index_copy(0, likely, likelihoods[0] + expected[likely])
        self._local.append(alone.log_softmax(dim=0))
        fits = self._likelihoods(row, states)  # (N,)
        best = int(scores.argmax())
        while self._n_surprised > 0 and self._is_surprising(
            row, states[(prior[beams, ids].double().log() + scores[beams] + fits).argmax()]
        ):
            near = torch.cat([(beams == best).nonzero()[:, 0], fits.topk(min(_TEACHERS, len(fits))).indices]).unique()
            shown = Shown(token_ids=ids[near], beams=beams[near], states=states[near], n_beams=len(prior))
            by_map = self._ranking.by_map(clean, shown, F.one_hot(torch.tensor(best), len(prior))).cpu().double()
            likely = torch.cat([_top(by_map, _LIKELY), ids]).unique()
            logs = prior[:, likely].double().log() + scores[:, None]
            likelihoods = self._ranking.sharpened(clean, shown, likely).cpu().double()
            ranked = logs + likelihoods
            more = (logs + with_unmapped(likelihoods))[best]  # (M,)
            more[torch.searchsorted(likely, ids[beams == best])] = -math.inf
            n = min(_MORE, self._n_surprised, int(more.isfinite().sum()))
            if not n:
                break
            self._n_surprised -= n
            new_ids, new_beams = likely[more.topk(n).indices], torch.full((n,), best)
            new_states = self._states(new_ids, new_beams)
            ids, beams = torch.cat([ids, new_ids]), torch.cat([beams, new_beams])
            states, fits = torch.cat([states, new_states]), torch.cat([fits, self._likelihoods(row, new_states)])
        exact = prior[beams, ids].double().log() + scores[beams] + fits
        self._note_distances(row, ids, states)
        at = torch.searchsorted(likely, ids)
        off = exact.logsumexp(dim=0) - ranked[beams, at].logsumexp(dim=0)  # noise that is not normal is off
        ranked[beams, at] = -math.inf
        elsewhere = (mean + total + by_map).index_fill(0, likely, -math.inf)
        unrun = Unrun(token_ids=likely, log_scores=ranked + off, log_elsewhere=elsewhere + off, beam_shares=shares)
        return Candidates(token_ids=ids, beams=beams, log_scores=exact, unrun=unrun)

    def _is_surprising(self, row: int, state: Tensor) -> bool:
        """Whether even the best state leaves more of a row than the noise explains: the right token was not run."""
        kept = self._noise.kept(self._observed[row][None])[0]
        spread = self._noise.variances(len(state)).to(state).sqrt() * abs(self._noise.scale)
        z = as_float64((self._observed[row] - self._noise.expected(state[None])[0]) * kept / spread)
        n = float(kept.sum())
        return float(z.square().sum()) > n + _SURPRISE * math.sqrt(2 * n)

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

    def _states(self, ids: Tensor, beams: Tensor) -> Tensor:
        if not len(ids):
            return self._observed[:0]
        states = self._prefixes.states(ids, beams).float()
        self._meter.spend(len(ids), self._model.layer)
        self._meter.n_checked += len(ids)
        return states


def _top(scores: Tensor, n: int) -> Tensor:
    """Return the places of the n highest scores. (V,) → (n,)."""
    return scores.topk(min(n, len(scores))).indices


def _more(rankings: Sequence[Tensor], at: Tensor, beams: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return columns and beams of up to n candidates beside those run, as many by each ranking. (B, M) each."""
    chosen = torch.zeros_like(rankings[0], dtype=torch.bool)
    for scores in rankings:
        left = scores.clone()
        left[beams, at] = -math.inf
        more_at, more_beams = _best(left, scores.flatten().logsumexp(dim=0), n // len(rankings))
        chosen[more_beams, more_at] = True
    places = chosen.flatten().nonzero()[:, 0]
    return places % chosen.shape[1], places // chosen.shape[1]


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
    own = (
        scores.topk(min(n_each, scores.shape[1]), dim=1).indices + torch.arange(len(scores))[:, None] * scores.shape[1]
    )  # (B, n_each)
    places = torch.cat([own.flatten(), scores.flatten().topk(min(n, scores.numel())).indices]).unique()
    return places % scores.shape[1], places // scores.shape[1]


def _with(wanted: tuple[int, int] | None, ids: Tensor, beams: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and beams, a wanted pair among them. (N,), (N,)."""
    if wanted is None or bool(((ids == wanted[0]) & (beams == wanted[1])).any()):
        return ids, beams
    return torch.cat([ids, torch.tensor(wanted[:1])]), torch.cat([beams, torch.tensor(wanted[1:])])
