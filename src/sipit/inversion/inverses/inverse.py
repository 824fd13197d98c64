"""What an inverse is: from observed states to a score for every token. It proves nothing."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sipit.inversion.inverses.token_keys import TokenKeys


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

    @property
    def echo_reach(self) -> float:
        """How near an earlier state must lie, over the norm, for its token to be tried first."""

    def queries_at(self, observed: Tensor, positions: Tensor, states: Tensor) -> Tensor:
        """Return the queries of states, were they the prompt's at some positions. (T, D), (N,), (N, D) → (N, K)."""

    def lengths(self, observed: Tensor, positions: Tensor) -> Tensor:
        """Return by what a token's key is multiplied in the query wanted at some positions. (T, D), (N,) → (N, 1)."""

    def are_first(self, observed: Tensor, positions: Tensor) -> Tensor:
        """Return which positions are read as first ones, by a reading of their own. (T, D), (N,) → (N,) bool."""

    def features(self, states: Tensor) -> Tensor:
        """Return states in units that a kernel may compare. (N, D) → (N, F)."""

    def other_query(self, observed: Tensor, position: int) -> Tensor | None:
        """Return a second reading of a state that may be of the other kind; None where it is not. (T, D) → (K,)."""

    def scores(self, queries: Tensor) -> Tensor:
        """Return the score of every token. (N, K) → (N, V)."""


def queries_of(inverse: Inverse, observed: Tensor) -> Tensor:
    """Return the query at every position of a prompt. (T, D) → (T, K)."""
    return inverse.queries_at(observed, torch.arange(len(observed)), observed)


def wanted(inverse: Inverse, observed: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Return what the queries at some positions are to be for some tokens. (T, D), (N,), (N,) → (N, K)."""
    return inverse.keys.keys(token_ids) * inverse.lengths(observed, positions)
