"""Read tokens off the observed states: an inverse's scores, the model's likelihood, what was checked.

Three sources, one order. An inverse (closed-form or fitted) scores every token from the states; the
model's own next-token probabilities are added where they cost less than they save; once candidates
were checked at a position without success, a regression on just these, behind this very prefix,
joins. The weights of the sum follow what proved right at the positions already recovered. The
order covers the whole vocabulary, so the search always ends.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sipit.inversion.check import Checked
from sipit.inversion.proposals.likely import Likely
from sipit.inversion.proposals.proposal import Scene
from sipit.inversion.regression import ridge
from sipit.inversion.token_keys import TokenKeys
from sipit.inversion.tree import Outlook, worthwhile

_BLOCK = 64  # positions scored at a time
_MAX_SCORES = 1 << 25  # scores held at once, over all positions ahead
_WIDTH = 8  # guesses kept for each position ahead
_PATIENCE = 8  # candidates checked in vain before a regression on them corrects the inverse
_DESPAIR = 64  # at which another regression on them does without the inverse
_PRIOR_NATS = 2.0  # evidence needed to leave the first pair of weights
_PERSISTENCE = 0.5  # candidates worth checking next, of those checked in vain: fewer are more passes, more are wasted
_BANDS = (0.5, 0.9, 0.99, 0.999)  # guesses of like certainty are judged together by how often they prove right
_PRIOR_GUESSES = 20.0  # of each band, assumed to have been right as often as they claimed
_SURE = 0.99  # a guess that proves right at this chance teaches nothing
_LOCAL_RIDGE = 1e-3
_LOCAL_GAIN = 75.0  # of a cosine, beside a log-probability


class Inverse(Protocol):
    """From states to a score for every token."""

    @property
    def keys(self) -> TokenKeys:
        """The directions that queries are compared with."""

    @property
    def weights(self) -> tuple[tuple[float, float], ...]:
        """Pairs (of the inverse's score, of the log-probability) to choose from as evidence comes in."""

    @property
    def doubtful_weights(self) -> tuple[float, float]:
        """Such a pair for positions where its first choices were wrong."""

    def queries(self, states: Tensor) -> Tensor:
        """Return one query a position of one prompt. (T, D) → (T, K)."""

    def amended_query(self, observed: Tensor, position: int, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return the query at a position, corrected by candidates checked there. (T, D), (N, D), (N,) → (K,)."""

    def other_query(self, state: Tensor) -> Tensor | None:
        """Return a second reading of a state that may be of the other kind; None where it is not. (D,) → (K,)."""

    def scores(self, queries: Tensor) -> Tensor:
        """Return the score of every token. (N, K) → (N, V)."""


@dataclass(frozen=True)
class _Guesses:
    """The best tokens of a block of positions."""

    weights: tuple[float, float]  # of the sum they were made with
    has_logs: bool
    token_ids: Tensor  # (W, K)
    chances: Tensor  # (W, K)

    def was_sure_of(self, row: int, token_id: int) -> bool:
        """Whether the token was guessed with hardly any doubt."""
        return int(self.token_ids[row, 0]) == token_id and float(self.chances[row, 0]) > _SURE


class Reader:
    """A proposal that reads every position from the observed states.

    Args:
        scene: where the search stands.
        inverse: what scores tokens.
        is_cautious: consult the likelihood only when this many candidates were wasted as its price is worth.
    """

    batch_limit: int | None = None

    def __init__(self, scene: Scene, inverse: Inverse, *, is_cautious: bool) -> None:
        self.scene = scene
        self._inverse = inverse
        self._likely = Likely(scene)
        self._queries = inverse.queries(scene.check.observed)  # (T, K)
        n_above = scene.lm.n_layers - scene.seen.layer
        self._patience = scene.seen.seq_len * n_above / max(scene.seen.layer, 1) if is_cautious else -1.0
        self._n_wasted = 0
        self._nats = torch.zeros(len(inverse.weights))  # negative log-likelihood of what proved right
        self._nats[1:] += _PRIOR_NATS
        self._n_blocks = max(2, _MAX_SCORES // (_BLOCK * scene.lm.vocab_size))
        self._scores: dict[int, Tensor] = {}  # first position of a block → (W, V)
        self._logs: dict[int, Tensor] = {}  # first position of a block → (W, V)
        self._seen = [0.0] * (len(_BANDS) + 1)  # guesses of each band that were settled
        self._right = [0.0] * (len(_BANDS) + 1)  # and that proved right
        self._guesses: dict[int, _Guesses] = {}  # first position of a block → its best tokens
        self._checked: list[Checked] = []
        self._first = 0.0

    @property
    def _uses_likelihood(self) -> bool:
        return self._n_wasted > self._patience and self.scene.seen.layer > 0

    def begin(self) -> None:
        self._checked = []

    def next(self, n: int, untried: Tensor) -> Tensor:
        n_checked = sum(len(c.token_ids) for c in self._checked)
        here = untried.to(self.scene.check.observed.device)
        logits = self._doubtful_logits(here) if n_checked >= _PATIENCE else self._logits(self.scene.position)
        logits = logits.masked_fill(~here, -torch.inf)  # (V,)
        n_left = int(untried.sum())
        if n_left == 0:
            return untried.nonzero()[:, 0]
        chances, order = logits.softmax(dim=0).topk(min(n, n_left))
        self._first = float(self._believed(chances)[0])
        n_worth = worthwhile(chances, self.scene.price)
        return order[: max(n_worth, int(_PERSISTENCE * n_checked))].cpu()

    def outlook(self) -> Outlook | None:
        return Outlook(first=self._first, ahead=self._ahead())

    def _ahead(self) -> Iterator[tuple[Tensor, Tensor]]:
        n_positions = min(self.scene.seen.seq_len, self.scene.position + self._n_blocks * _BLOCK)
        for position in range(self.scene.position + 1, n_positions):
            guesses = self._guesses_at(position)
            yield guesses.token_ids[position % _BLOCK], self._believed(guesses.chances[position % _BLOCK])

    def _guesses_at(self, position: int) -> _Guesses:
        """Return the best tokens of the block of positions that holds this one, by today's weights."""
        self._rows(position)
        start = position - position % _BLOCK
        weights = self._weights
        logs = self._logs.get(start) if self._uses_likelihood else None
        known = self._guesses.get(start)
        if known is None or known.weights != weights or known.has_logs != (logs is not None):
            logits = _fused(weights, self._scores[start], logs)  # (W, V)
            best = logits.topk(min(_WIDTH, logits.shape[1]), dim=1)
            chances = (best.values - logits.logsumexp(dim=1, keepdim=True)).exp()
            known = _Guesses(weights, logs is not None, best.indices.cpu(), chances.cpu())
            self._guesses[start] = known
        return known

    def learn(self, checked: Checked) -> None:
        self._checked.append(checked)
        self._n_wasted += len(checked.token_ids)

    def _believed(self, chances: Tensor) -> Tensor:
        """Return chances of the best tokens, best first, as far as guesses of like certainty bore them out. (K,)."""
        claimed = float(chances[0])
        band = bisect(_BANDS, claimed)
        rate = (self._right[band] + _PRIOR_GUESSES * claimed) / (self._seen[band] + _PRIOR_GUESSES)
        return chances * (rate / max(claimed, 1e-9))

    def settle(self, token_id: int) -> None:
        position = self.scene.position
        guesses = self._guesses.get(position - position % _BLOCK)
        if guesses is not None:
            band = bisect(_BANDS, float(guesses.chances[position % _BLOCK, 0]))
            self._seen[band] += 1
            self._right[band] += int(guesses.token_ids[position % _BLOCK, 0]) == token_id
        if position == 0 or (guesses is not None and guesses.was_sure_of(position % _BLOCK, token_id)):
            return  # says nothing about the weights
        row, logs = self._rows(position)
        for i, weights in enumerate(self._inverse.weights):
            logits = _fused(weights, row, logs)
            self._nats[i] += float(logits.logsumexp(dim=0) - logits[token_id])

    def _logits(self, position: int) -> Tensor:
        return _fused(self._weights, *self._rows(position))  # (V,)

    @property
    def _weights(self) -> tuple[float, float]:
        """The pair of weights that the recovered positions speak for."""
        return self._inverse.weights[int(self._nats.argmin())]

    def _rows(self, position: int) -> tuple[Tensor, Tensor | None]:
        """Return the inverse's scores and the log-probabilities at a position. (V,), (V,)."""
        start = position - position % _BLOCK
        stop = min(start + _BLOCK, self.scene.seen.seq_len)
        for old in [s for s in self._scores if s + _BLOCK <= self.scene.position]:
            del self._scores[old]
            self._logs.pop(old, None)
            self._guesses.pop(old, None)
        if start not in self._scores:
            self._scores[start] = self._inverse.scores(self._queries[start:stop])
        row = self._scores[start][position - start]
        if not self._uses_likelihood:
            return row, None
        if start not in self._logs:
            self._logs[start] = self._likely.logits(start, stop)
        return row, self._logs[start][position - start]

    def _doubtful_logits(self, untried: Tensor) -> Tensor:
        """Return logits where candidates were checked in vain: the inverse is wrong here. (V,) → (V,).

        What it gets wrong is learned from these candidates. The likelihood may be wrong here too (it
        knows nothing at position 1), so that orders with and without it take turns.
        """
        inverse, scene = self._inverse, self.scene
        states = torch.cat([c.states for c in self._checked]).float()  # (N, D)
        tokens = torch.cat([c.token_ids for c in self._checked])  # (N,)
        query = inverse.amended_query(scene.check.observed, scene.position, states, tokens)
        _, logs = self._rows(scene.position)
        readings = [inverse.scores(query[None])[0]]
        if logs is not None:
            readings.append(_fused(inverse.doubtful_weights, readings[0], logs))
        if len(tokens) >= _DESPAIR:
            keys = inverse.keys
            query = ridge(states, keys.keys(tokens), _LOCAL_RIDGE)(scene.target[None].float())
            readings.append(_fused((_LOCAL_GAIN, 1.0), keys.scores(query)[0], logs))
        other = inverse.other_query(scene.target)
        if other is not None:
            readings.append(inverse.scores(other[None])[0])
        readings = [scores.masked_fill(~untried, -torch.inf) for scores in readings]
        return torch.stack([_by_rank(scores) for scores in readings]).amax(dim=0) if len(readings) > 1 else readings[0]


def _by_rank(scores: Tensor) -> Tensor:
    """Return logits that fall with the rank alone, so that the larger of two of them takes from each in turn. (V,)."""
    ranks = torch.empty_like(scores)
    ranks[scores.argsort(descending=True)] = torch.arange(1.0, len(scores) + 1, device=scores.device)
    return -ranks.log()


def _fused(weights: tuple[float, float], scores: Tensor, logs: Tensor | None) -> Tensor:
    """Return the weighted sum of scores and log-probabilities, where there are any."""
    weighted = weights[0] * scores
    return weighted if logs is None else weighted.add_(logs, alpha=weights[1])
