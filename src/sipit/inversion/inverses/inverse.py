"""What an inverse is: from observed states to a score for every token. It proves nothing."""

from __future__ import annotations

from typing import Protocol

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

    def queries(self, states: Tensor) -> Tensor:
        """Return one query a position of one prompt. (T, D) → (T, K)."""

    def amended_query(self, observed: Tensor, position: int, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return the query at a position, corrected by candidates checked there. (T, D), (N, D), (N,) → (K,)."""

    def other_query(self, observed: Tensor, position: int) -> Tensor | None:
        """Return a second reading of a state that may be of the other kind; None where it is not. (T, D) → (K,)."""

    def scores(self, queries: Tensor) -> Tensor:
        """Return the score of every token. (N, K) → (N, V)."""
