"""A fit as an inverse: one query a position, the score of every token. Imports no training."""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.inverses.network import KEY_LENGTH
from sipit.inversion.inverses.sinks import alternative_kind, are_sink_like
from sipit.inversion.inverses.store import Fit
from sipit.inversion.inverses.token_keys import TokenKeys

_FIRST_LOGIT = 40.0  # of a cosine of 1 at position 0, whatever the temperature: near the least cross-entropy
_NATURAL = (0.8, 0.5)  # of scores and log-probabilities: natural text is likelier than what a fit is calibrated on


class FittedInverse:
    """A fit as an inverse: one query a position, the score of every token."""

    doubtful_weights = (0.6, 0.75)
    echo_reach = 0.1

    def __init__(self, keys: TokenKeys, fit: Fit) -> None:
        self.keys = keys
        self.fit = fit
        calibrated = (1.0, fit.likelihood_weight)  # to all kinds of held-out text at once, random ids among them
        self.weights: tuple[tuple[float, float], ...] = (_NATURAL, calibrated, (1.0, 0.0), (0.6, 0.5), (0.6, 1.0))

    def queries_at(self, observed: Tensor, positions: Tensor, states: Tensor) -> Tensor:
        """Return the queries of states, were they the prompt's at some positions. (T, D), (N,), (N, D) → (N, K)."""
        is_first = self.are_first(observed, positions)
        queries = self.fit.network.queries_at(observed, positions, states)
        queries[is_first] = self._first_queries(states[is_first])
        return queries

    def lengths(self, observed: Tensor, positions: Tensor) -> Tensor:
        """Return by what a token's key is multiplied in the query wanted at some positions. (T, D), (N,) → (N, 1)."""
        return torch.where(self.are_first(observed, positions), self._first_gain, KEY_LENGTH)[:, None]

    def are_first(self, observed: Tensor, positions: Tensor) -> Tensor:
        """Return which positions are read as first ones. (T, D), (N,) → (N,) bool."""
        return are_sink_like(observed, positions, self.fit.first_mean, self.fit.sink_cosine)

    def features(self, states: Tensor) -> Tensor:
        """Return whitened states. (N, D) → (N, D)."""
        return self.fit.network.white(states)

    def other_query(self, observed: Tensor, position: int) -> Tensor | None:
        """Return the query of the other reading where a state may be of the other kind. (T, D) → (K,)."""
        fit, state = self.fit, observed[position][None]
        kind = alternative_kind(observed, position, fit.first_mean, fit.sink_cosine)
        if kind is None:
            return None
        queries = (
            self._first_queries(state)
            if kind == "first"
            else fit.network.queries_at(observed, torch.tensor([position]), state)
        )
        return queries[0]

    def _first_queries(self, states: Tensor) -> Tensor:
        first = (as_float64(states) - self.fit.first_mean) @ self.fit.first_weight
        return torch.nn.functional.normalize(first, dim=1).to(states.device, torch.float32) * self._first_gain

    @property
    def _first_gain(self) -> float:
        return _FIRST_LOGIT / KEY_LENGTH * self.fit.temperature

    def scores(self, queries: Tensor) -> Tensor:
        """Return calibrated scores of every token. (N, K) → (N, V)."""
        temperature = self.fit.temperature
        return self.keys.scores(queries * (KEY_LENGTH / temperature)).add_(self.fit.network.bias / temperature)
