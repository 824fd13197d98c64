"""What an inverse gets wrong on one prompt, learned from the tokens that were run in it, right ones and wrong ones.

The state of a wrong token is the state of a known token all the same, in this very text: what the inverse reads from
it, and what it ought to, differ by much the same as at the other positions. A regression in a kernel's space carries
the difference over. It orders candidates and proves nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.inversion.inverses.inverse import Inverse, wanted
from sipit.inversion.inverses.kernel_regression import arc_cosine_kernel, kernel_coefficients

_MOST = 512  # states that are learned from, those of the latest passes: a regression on more costs what it saves
_RIDGE = 0.1  # of the mean of the kernel's diagonal


class Correction:
    """Learns from states of known tokens, and corrects the queries of one prompt. T positions, D wide.

    Args:
        inverse: whose queries are corrected.
        observed: the rows that it reads. (T, D)
        queries: what it reads from them. (T, K)
    """

    def __init__(self, inverse: Inverse, observed: Tensor, queries: Tensor) -> None:
        self._inverse = inverse
        self._observed = observed
        self._queries = queries
        self._new: list[tuple[list[int], list[int], Tensor]] = []  # positions, tokens, states (N, D)
        self._n_new = 0  # states among them
        self._accepted: list[tuple[int, int]] = []  # (position, token), whose states are those observed
        self._features = observed.new_empty(0, dtype=torch.float32)  # (N, F) of what is learned from
        self._missing = observed.new_empty(0, dtype=torch.float32)  # (N, K) what its queries lack
        self._coefficients: Tensor | None = None  # (N, K)
        self.n_heard = 0  # states that were noted in all

    def note(self, position: int, token_ids: list[int], states: Tensor) -> None:
        """Take note of the states of tokens that were run at a position, as the inverse reads them. (N, D)."""
        self._new.append(([position] * len(token_ids), token_ids, states))
        self._n_new += len(token_ids)
        while self._n_new - len(self._new[0][0]) >= _MOST:  # where nobody asks, memory stays bounded all the same
            self._n_new -= len(self._new.pop(0)[0])
        self.n_heard += len(token_ids)

    def accept(self, position: int, token_id: int) -> None:
        """Take note of a token that is known: its state is the one observed."""
        self._accepted.append((position, token_id))
        self.n_heard += 1

    def queries(self, positions: list[int]) -> Tensor:
        """Return the queries at some positions, corrected by all that was noted. (N, K)."""
        self._learn()
        places = torch.tensor(positions, device=self._queries.device)
        plain = self._queries[places]
        if self._coefficients is None:
            return plain
        missing = arc_cosine_kernel(self._inverse.features(self._observed[places]), self._features) @ self._coefficients
        is_first = self._inverse.are_first(self._observed, places)
        return torch.where(is_first[:, None], plain, plain + missing)  # (N, K)

    def _learn(self) -> None:
        """Make the regression anew if there is something to learn."""
        if self._accepted:
            places, tokens = (list(part) for part in zip(*self._accepted, strict=True))
            self._new.append((places, tokens, self._observed[places]))
            self._accepted = []
        if not self._new:
            return
        device = self._queries.device
        positions = torch.tensor([place for places, _, _ in self._new for place in places], device=device)
        token_ids = torch.tensor([token_id for _, tokens, _ in self._new for token_id in tokens], device=device)
        states = torch.cat([part.float() for _, _, part in self._new])
        self._new, self._n_new = [], 0
        is_of_use = states.isfinite().all(dim=1) & ~self._inverse.are_first(self._observed, positions)
        if not bool(is_of_use.any()):
            return
        positions, token_ids, states = (part[is_of_use][-_MOST:] for part in (positions, token_ids, states))
        inverse, observed = self._inverse, self._observed
        missing = wanted(inverse, observed, positions, token_ids) - inverse.queries_at(observed, positions, states)
        self._features = torch.cat([self._features.view(-1, states.shape[1]), inverse.features(states)])[-_MOST:]
        self._missing = torch.cat([self._missing.view(-1, missing.shape[1]), missing])[-_MOST:]
        self._coefficients = kernel_coefficients(self._features, self._missing, _RIDGE)
