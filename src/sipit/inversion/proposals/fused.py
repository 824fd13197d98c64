"""Read tokens off the observed states: an inverse's scores, the model's likelihood, what was checked.

Three sources, one order. An inverse (closed-form or fitted) scores every token from the states, corrected
where it is unsure by all that was run in this prompt; the model's own next-token probabilities are added
where they cost less than they save; once candidates were checked at a position without success, a
regression on just these, behind this very prefix, joins. The weights of the sum follow what proved right
at the positions already recovered. The order covers the whole vocabulary, so the search always ends.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.inversion.inverses.correction import Correction
from sipit.inversion.inverses.inverse import Inverse, queries_of, wanted
from sipit.inversion.inverses.log_sum import log_sum_exp
from sipit.inversion.inverses.restored import restored
from sipit.inversion.inverses.ridge import amended_query, ridge
from sipit.inversion.inverses.top import likeliest_of_rows, top_of_rows
from sipit.inversion.judging.check import Checked
from sipit.inversion.proposals.likely import Likely
from sipit.inversion.proposals.off_path import OffPathEvidence
from sipit.inversion.proposals.price import n_worth_checking
from sipit.inversion.proposals.proposal import Draft, Guesses, SearchView
from sipit.inversion.proposals.repeated import RepeatedStates

_BLOCK = 64  # positions scored at a time
_MAX_SCORES = 1 << 25  # scores held at once, over all positions ahead
_WIDTH = 32  # guesses kept for each position ahead
_CORRECT_AFTER = 8  # candidates checked in vain before a regression on them corrects the inverse
_REFIT_AFTER = 64  # at which another regression on them does without the inverse
_HOPELESS = 512  # at which the order of all that is left is settled, until twice as many were
_MOST_LEARNED = 4096  # candidates of one position that regressions learn from: later ones cost what they never save
_LEAST_HEARD = -1.0  # nats that what was overheard may count against a token where the order is one of ranks
_PRIOR_NATS = 2.0  # evidence needed to leave the first pair of weights
_MIN_BATCH_SHARE = (
    0.5  # candidates worth checking next, of those checked in vain: fewer are more passes, more are wasted
)
_MIN_PASS_SHARE = 0.66  # candidates checked where the first ones were wrong, of what a pass costs in any case
_BANDS = (0.5, 0.9, 0.99, 0.999)  # guesses of like certainty are judged together by how often they prove right
_PRIOR_GUESSES = 20.0  # of each band, assumed to have been right as often as they claimed
_JUDGED = 32  # positions that the weights are judged by: later ones seldom change them
_SURE = 0.9  # a guess that proves right at this chance teaches nothing
_CERTAIN = 0.999  # a guess by the inverse alone, for which the likelihood is not consulted
_CORRECTED = 0.99  # chance of a guess up to which the inverse's reading is corrected by what was run elsewhere
_BLOCK_WEIGHTS = 12  # of a block, over the squared width of the model
_CORRECTED_ROWS = 64  # positions whose scores cost what a correction does: it has to spare a pass that costs more
_NOTED = 16  # candidates checked in vain in one pass, the nearest, that other positions learn from
_ECHO_NATS = 3.0  # for the token of an earlier state nearly like this one, against all others together
_LOCAL_RIDGE = 1e-3
_LOCAL_GAIN = 75.0  # of a cosine, beside a log-probability


@dataclass(frozen=True)
class _Guesses:
    """The best tokens of a block of positions."""

    weights: tuple[float, float]  # of the sum they were made with
    has_logs: bool
    token_ids: list[list[int]]  # (W, K)
    chances: list[list[float]]  # (W, K)

    def was_sure_of(self, row: int, token_id: int) -> bool:
        """Whether the token was guessed with hardly any doubt."""
        return self.token_ids[row][0] == token_id and self.chances[row][0] > _SURE


class FusedProposal:
    """A proposal that reads every position from the observed states.

    Args:
        view: where the search stands.
        inverse: what scores tokens.
        is_cautious: consult the likelihood only when this many candidates were wasted as its price is worth.
    """

    batch_limit: int | None = None

    def __init__(self, view: SearchView, inverse: Inverse, *, is_cautious: bool) -> None:
        self.view = view
        self._inverse = inverse
        self._likely = Likely(view)
        self._restored = restored(view.lm, view.seen.cut)
        places = torch.arange(len(view.values))
        self._observed = self._restored.rows(view.values, places)  # (T, D)
        self._queries = queries_of(inverse, self._observed)  # (T, K)
        self._correction = Correction(inverse, self._observed, self._queries)
        pass_weights = view.price * view.seen.layer * _BLOCK_WEIGHTS * view.lm.d_model
        self._corrects = pass_weights >= _CORRECTED_ROWS * view.lm.vocab_size
        n_above = view.lm.n_layers - view.seen.layer
        self._patience = view.seen.seq_len * n_above / max(view.seen.layer, 1) if is_cautious else -1.0
        self._n_wasted = 0
        self._nats = torch.zeros(len(inverse.weights))  # negative log-likelihood of what proved right
        self._nats[1:] += _PRIOR_NATS
        self._n_judged = 0  # positions that the weights were judged by
        self._n_blocks = max(2, _MAX_SCORES // (_BLOCK * view.lm.vocab_size))
        self._scores: dict[int, Tensor] = {}  # first position of a block → (W, V)
        self._logs: dict[int, Tensor] = {}  # position → (V,)
        self._seen = [0.0] * (len(_BANDS) + 1)  # guesses of each band that were settled
        self._right = [0.0] * (len(_BANDS) + 1)  # and that proved right
        self._guesses: dict[int, _Guesses] = {}  # first position of a block → its best tokens
        self._corrected: dict[int, tuple[list[int], list[float]]] = {}  # position → its best tokens, corrected
        self._corrected_rows: dict[int, Tensor] = {}  # position → its scores, corrected, of the one stood at. (V,)
        self._corrected_by = 0  # states that both were learned from
        self._checked: list[Checked] = []
        self._overheard = OffPathEvidence(view.values)
        self._echoes = RepeatedStates(self._observed, inverse.echo_reach)
        self._here: list[float] = []  # chances of what was last offered
        self._n_vain = 0  # candidates checked in vain at this position
        self._rest: Tensor | None = None  # (V,) the order settled after many of them
        self._settled_until = 0  # as many of them as make it worth settling anew

    @property
    def _uses_likelihood(self) -> bool:
        return self._n_wasted > self._patience and self._likely.can_go_on

    def begin(self) -> None:
        self._checked = []
        self._n_vain = 0
        self._rest = None

    def next(self, n: int, untried: Tensor) -> Tensor:
        n_checked = self._n_vain
        here = untried.to(self.view.check.observed.device)
        n_left = int(untried.sum())
        self._here = []  # where the order is one of ranks that was settled long ago, no chance is known
        if n_left == 0:
            return untried.nonzero()[:, 0]
        if self._rest is not None and (n_checked < self._settled_until or n_checked > _MOST_LEARNED):
            return self._rest[untried[self._rest]][:n]
        is_doubtful = n_checked >= _CORRECT_AFTER
        heard = self._overheard.evidence(self.view.position)
        is_corrected = not is_doubtful and self._is_unsure(self.view.position)
        logits = self._doubtful_logits() if is_doubtful else self._logits(self.view.position)  # (V,)
        readings = [logits, self._corrected_logits()] if is_corrected else [logits]
        for token_id, nats in heard.items():
            for reading in readings:
                reading[token_id] += max(nats, _LEAST_HEARD) if is_doubtful else nats
        if is_corrected:  # the mean of both chances: either is sure where it is wrong, the two seldom of one token
            logits = torch.logaddexp(*(reading - log_sum_exp(reading) for reading in readings))
        if n_checked >= _HOPELESS:
            self._rest, self._settled_until = logits.argsort(descending=True, stable=True).cpu(), 2 * n_checked
            return self._rest[untried[self._rest]][:n]
        logits = logits.masked_fill(~here, -torch.inf)
        echo = self._echoes.token(self.view.position, self.view.prefix)
        is_echo = echo is not None and bool(here[echo])
        if is_echo:
            logits[echo] = log_sum_exp(logits) + _ECHO_NATS
        best, order = top_of_rows(logits[None], min(n, n_left))
        chances = (best[0] - log_sum_exp(logits)).exp().tolist()
        order = order[0]
        n_least = max(_MIN_BATCH_SHARE * n_checked, _MIN_PASS_SHARE * self.view.price if n_checked else 0)
        n_worth = max(n_worth_checking(chances, self.view.price), int(n_least))
        is_claimed = bool(heard) or is_echo or is_corrected
        self._here = (chances if is_claimed else self._believed(chances))[:n_worth]
        return order[:n_worth].cpu()

    def draft(self) -> Draft | None:
        return Draft(here=self._here, ahead=self._ahead())

    def guesses(self, position: int, n: int) -> Tensor:
        return (
            self._block(position - position % _BLOCK)[position % _BLOCK]
            .topk(min(n, self.view.lm.vocab_size))
            .indices.cpu()
        )

    def _ahead(self) -> Iterator[Guesses]:
        n_positions = min(self.view.seen.seq_len, self.view.position + self._n_blocks * _BLOCK)
        for position in range(self.view.position + 1, n_positions):
            token_ids, chances = self._plain_guesses(position)
            corrected = self._corrected_guesses(position)
            if corrected is not None:
                token_ids, chances = _mixed((token_ids, chances), corrected)
            echo = self._echoes.token(position, self.view.prefix)
            yield (token_ids, chances) if echo is None else _echoed(token_ids, chances, echo)

    def _plain_guesses(self, position: int) -> Guesses:
        """Return a position's best tokens by the inverse as it is, after what was overheard."""
        guesses, row = self._guesses_at(position), position % _BLOCK
        believed = self._believed(guesses.chances[row])
        return _informed(guesses.token_ids[row], believed, self._overheard.evidence(position))

    def _is_unsure(self, position: int) -> bool:
        """Whether what was run in this prompt may change the guess at a position."""
        if not self._correction.n_heard or position == 0:
            return False
        is_vain = position == self.view.position and self._n_vain > 0
        return is_vain or self._plain_guesses(position)[1][0] < _CORRECTED

    def _corrected_guesses(self, position: int) -> Guesses | None:
        """Return a position's best tokens by the corrected inverse; None where the plain one is sure."""
        if not self._is_unsure(position):
            return None
        self._read_again(position)
        return _informed(*self._corrected[position], self._overheard.evidence(position))

    def _read_again(self, position: int) -> None:
        """Read a position by the corrected inverse, and with it all the block's unsure ones from there on."""
        if self._corrected_by != self._correction.n_heard:
            self._corrected_by, self._corrected, self._corrected_rows = self._correction.n_heard, {}, {}
        if position in (self._corrected_rows if position == self.view.position else self._corrected):
            return
        stop = position - position % _BLOCK + _BLOCK
        unsure = [p for p in range(position, min(stop, len(self._queries))) if self._is_unsure(p)]
        scores = self._inverse.scores(self._correction.queries(unsure))  # (N, V)
        self._corrected.update(zip(unsure, zip(*self._best(scores, unsure), strict=True), strict=True))
        if position == self.view.position:
            self._corrected_rows = {position: scores[0].clone()}

    def _guesses_at(self, position: int) -> _Guesses:
        """Return the best tokens of the block of positions that holds this one, by today's weights."""
        start = position - position % _BLOCK
        weights, has_logs = self._weights, self._uses_likelihood
        known = self._guesses.get(start)
        if known is None or known.weights != weights or known.has_logs != has_logs:
            scores = self._block(start)
            known = _Guesses(weights, has_logs, *self._best(scores, range(start, start + len(scores))))
            self._guesses[start] = known
        return known

    def _best(self, scores: Tensor, positions: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Return the best tokens of some positions and their chances, by scores and what likelihood is used. (N, K)."""
        n, is_heard = min(_WIDTH, scores.shape[1]), self._uses_likelihood
        token_ids, chances = likeliest_of_rows(scores, n, self._weights, exact_from=_CERTAIN if is_heard else 0.0)
        unsure = (chances[:, 0] < _CERTAIN).nonzero()[:, 0].tolist()
        if is_heard and unsure:
            logs = self._log_rows([positions[row] for row in unsure])
            rows = [scores[row] for row in unsure]
            token_ids[unsure], chances[unsure] = likeliest_of_rows(rows, n, self._weights, logs)
        return token_ids.tolist(), chances.tolist()

    def learn(self, checked: Checked) -> None:
        self._n_vain += len(checked.token_ids)
        if self._n_vain <= _MOST_LEARNED:  # else nothing is learned any more, and their states need no memory
            rows = self._restored.rows(checked.states, torch.full((len(checked.states),), self.view.position))
            self._checked.append(replace(checked, states=rows))
            if self._corrects:
                nearest = checked.distances.argsort()[:_NOTED].tolist()
                self._correction.note(self.view.position, checked.token_ids[nearest].tolist(), rows[nearest])
        self._n_wasted += len(checked.token_ids)

    def overhear(self, position: int, checked: Checked) -> None:
        self._overheard.note(position, checked)
        if self._corrects:
            rows = self._restored.rows(checked.states, torch.full((len(checked.states),), position))
            self._correction.note(position, checked.token_ids.tolist(), rows)

    def _believed(self, chances: list[float]) -> list[float]:
        """Return chances of the best tokens, best first, as far as guesses of like certainty bore them out."""
        claimed = chances[0]
        band = bisect(_BANDS, claimed)
        rate = (self._right[band] + _PRIOR_GUESSES * claimed) / (self._seen[band] + _PRIOR_GUESSES)
        others = (1 - rate) / max(1 - claimed, 1e-9)
        return [rate, *(min(rate, chance * others) for chance in chances[1:])]

    def settle(self, token_id: int) -> None:
        position = self.view.position
        self._overheard.settle(position, token_id)
        if self._corrects:
            self._correction.accept(position, token_id)
        guesses = self._guesses.get(position - position % _BLOCK)
        if guesses is not None:
            band = bisect(_BANDS, guesses.chances[position % _BLOCK][0])
            self._seen[band] += 1
            self._right[band] += guesses.token_ids[position % _BLOCK][0] == token_id
        is_sure = guesses is not None and guesses.was_sure_of(position % _BLOCK, token_id)
        if position == 0 or is_sure or self._n_judged == _JUDGED:
            return  # says nothing about the weights, or nothing new
        self._n_judged += 1
        row, logs = self._rows(position)
        for i, weights in enumerate(self._inverse.weights):
            logits = _fused(weights, row, logs)
            self._nats[i] += float(log_sum_exp(logits) - logits[token_id])

    def _corrected_logits(self) -> Tensor:
        """Return the corrected inverse's scores and the log-probabilities at this position, as one sum. (V,)."""
        self._read_again(self.view.position)
        return _fused(self._weights, self._corrected_rows[self.view.position], self._rows(self.view.position)[1])

    def _logits(self, position: int) -> Tensor:
        return _fused(self._weights, *self._rows(position))  # (V,)

    @property
    def _weights(self) -> tuple[float, float]:
        """The pair of weights that the recovered positions speak for."""
        return self._inverse.weights[int(self._nats.argmin())]

    def _rows(self, position: int) -> tuple[Tensor, Tensor | None]:
        """Return the inverse's scores and the log-probabilities at a position. (V,), (V,)."""
        start = position - position % _BLOCK
        row = self._block(start)[position - start]
        if self._uses_likelihood:
            return row, self._log_rows([position])[0]
        if self._restored.are_states and self.view.is_gapless:
            return row, None
        pays = self._n_vain * (self.view.seen.layer + 1) >= self.view.lm.n_layers  # it is a pass of the whole model
        if self._n_vain and pays and position not in self._logs:
            self._logs = {position: self._likely.behind_prefix.logits()}
        return row, self._logs.get(position)

    def _block(self, start: int) -> Tensor:
        """Return the inverse's scores at a block of positions, kept until it is behind. (W, V)."""
        for old in [s for s in self._scores if s + _BLOCK <= self.view.position]:
            del self._scores[old]
            self._guesses.pop(old, None)
        if start not in self._scores:
            self._scores[start] = self._inverse.scores(self._queries[start : start + _BLOCK])
        return self._scores[start]

    def _log_rows(self, positions: Sequence[int]) -> list[Tensor]:
        """Return the log-probabilities at some positions, kept until they are behind. N of (V,)."""
        for old in [p for p in self._logs if p < self.view.position]:
            del self._logs[old]
        new = [p for p in positions if p not in self._logs]
        if new:
            self._logs.update(zip(new, self._likely.logits(new), strict=True))
        return [self._logs[p] for p in positions]

    def _doubtful_logits(self) -> Tensor:
        """Return logits where candidates were checked in vain: the inverse is wrong here. (V,).

        What it gets wrong is learned from these candidates. The likelihood may be wrong here too (it
        knows nothing at position 1), so that orders with and without it take turns. Ranks are over the
        whole vocabulary, tried tokens included: among the untried alone a rank would fall at each call,
        and evidence against a token would put it behind the best of what is left for ever.
        """
        inverse, view = self._inverse, self.view
        states = torch.cat([c.states for c in self._checked]).float()  # (N, D)
        tokens = torch.cat([c.token_ids for c in self._checked])  # (N,)
        rows = torch.cat([self._observed[view.position][None].float(), states])  # (N + 1, D)
        places = torch.full((len(rows),), view.position, device=rows.device)
        queries = inverse.queries_at(self._observed, places, rows)
        query = amended_query(rows, queries, wanted(inverse, self._observed, places[1:], tokens))
        _, logs = self._rows(view.position)
        readings = [inverse.scores(query[None])[0]]
        if logs is not None:
            readings.append(_fused(inverse.doubtful_weights, readings[0], logs))
        if len(tokens) >= _REFIT_AFTER:
            keys = inverse.keys
            target = self._observed[view.position][None].float()
            query = ridge(states, keys.keys(tokens), _LOCAL_RIDGE)(target)
            readings.append(_fused((_LOCAL_GAIN, 1.0), keys.scores(query)[0], logs))
        other = inverse.other_query(self._observed, view.position)
        if other is not None:
            readings.append(inverse.scores(other[None])[0])
        return torch.stack([_by_rank(scores) for scores in readings]).amax(dim=0) if len(readings) > 1 else readings[0]


def _informed(token_ids: list[int], chances: list[float], evidence: dict[int, float]) -> Guesses:
    """Return the best tokens of a position and their chances, best first, after evidence in nats."""
    if not evidence:
        return token_ids, chances
    rest = max(0.0, 1 - sum(chances))  # of all other tokens, of which nothing was heard
    weighed = [c * math.exp(evidence.get(i, 0.0)) for i, c in zip(token_ids, chances, strict=True)]
    total = sum(weighed) + rest
    order = sorted(range(len(weighed)), key=lambda k: -weighed[k])
    return [token_ids[k] for k in order], [weighed[k] / total for k in order]


def _mixed(one: Guesses, other: Guesses) -> Guesses:
    """Return the tokens of two readings of a position by the mean of their chances, the best first."""
    mean: dict[int, float] = {}
    for token_ids, chances in (one, other):
        for token_id, chance in zip(token_ids, chances, strict=True):
            mean[token_id] = mean.get(token_id, 0.0) + chance / 2
    order = sorted(mean, key=lambda token_id: -mean[token_id])
    return order, [mean[token_id] for token_id in order]


def _echoed(token_ids: list[int], chances: list[float], echo: int) -> Guesses:
    """Return a position's best tokens and their chances with an echo before all others."""
    rest = math.exp(-_ECHO_NATS)
    others = [(i, rest * c / (1 + rest)) for i, c in zip(token_ids, chances, strict=True) if i != echo]
    return [echo, *(i for i, _ in others)], [1 / (1 + rest), *(c for _, c in others)]


def _by_rank(scores: Tensor) -> Tensor:
    """Return logits that fall with the rank alone, so that the larger of two of them takes from each in turn. (V,)."""
    ranks = torch.empty_like(scores)
    ranks[scores.argsort(descending=True)] = torch.arange(1.0, len(scores) + 1, device=scores.device)
    return -ranks.log()


def _fused(weights: tuple[float, float], scores: Tensor, logs: Tensor | None) -> Tensor:
    """Return the weighted sum of scores and log-probabilities, where there are any."""
    weighted = weights[0] * scores
    return weighted if logs is None else weighted.add_(logs, alpha=weights[1])
