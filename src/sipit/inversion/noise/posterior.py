"""The posterior of every token at every position, what a beam search leaves out on the way included.

A search that counts only what is left at its end is sure of everything: the beams that are left share their early
tokens. Here a path that is left out keeps the share of all mass it had then, and those that go on share the rest.
Shapes: T rows, B beams, N candidates, M others that are likely, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Unrun:
    """Continuations of beams at one position that were not run, as they were ranked."""

    token_ids: Tensor  # (M,) likely ones, each another
    log_scores: Tensor  # (B, M) float64, -inf of those that were run
    log_elsewhere: Tensor  # (V,) float64 of other tokens behind all beams, -inf of the likely ones
    beam_shares: Tensor  # (B,) float64: of what is elsewhere

    @property
    def log_mass(self) -> Tensor:
        """Of all of them: ()."""
        return torch.logaddexp(self.log_scores.flatten().logsumexp(dim=0), self.log_elsewhere.logsumexp(dim=0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Continuations of beams at one position. N of them were run through the model."""

    token_ids: Tensor  # (N,)
    beams: Tensor  # (N,) that each continues
    log_scores: Tensor  # (N,) float64
    unrun: Unrun  # all others


class TokenPosteriors:
    """Where the mass of one search is."""

    def __init__(self, n_rows: int, vocab_size: int) -> None:
        self._mass = torch.zeros(n_rows, vocab_size, dtype=torch.float64)  # (T, V) of what was left out
        self._here = torch.zeros(n_rows, vocab_size, dtype=torch.float64)  # (T, V) of all that reached a position
        self._ahead = torch.zeros(n_rows, dtype=torch.float64)  # (T,) of it, with no token at a position yet
        self.left = 1.0  # mass of the paths that go on

    def leave_out(self, row: int, prefixes: Tensor, found: Candidates, kept: Tensor) -> None:
        """Count the candidates at a row that do not go on. (B, t) tokens of the beams so far, (B',) that do."""
        unrun = found.unrun
        total = torch.logaddexp(found.log_scores.logsumexp(dim=0), unrun.log_mass)
        shares = (found.log_scores - total).exp() * self.left  # (N,)
        go_on = shares[kept].sum()
        self._here[row].index_add_(0, found.token_ids, shares)
        shares = shares.index_fill(0, kept, 0.0)
        others = (unrun.log_scores - total).exp() * self.left  # (B, M)
        elsewhere = (unrun.log_elsewhere - total).exp() * self.left  # (V,)
        of_beams = others.sum(dim=1) + elsewhere.sum() * unrun.beam_shares  # (B,)
        of_beams.index_add_(0, found.beams, shares)
        of_tokens = elsewhere.index_add_(0, unrun.token_ids, others.sum(dim=0))  # (V,)
        for place in range(row):
            self._mass[place].index_add_(0, prefixes[:, place], of_beams)
        self._mass[row] += of_tokens
        self._here[row] += of_tokens
        self._mass[row].index_add_(0, found.token_ids, shares)
        self._ahead[row + 1 :] += of_beams.sum()
        self.left = float(go_on)

    def ended(self, tokens: Tensor, shares: Tensor, local: Sequence[Tensor]) -> Tensor:
        """Return the posterior of every token, given the beams left at the end. (B, T), (B,) → (T, V).

        Of paths that were left out before a position, the token there is not known. Half of them count as the paths
        that reached it, from which they may differ by one early token; half as that row alone tells, whose
        log-probabilities are given: T of (V,).
        """
        found = self._mass.clone()
        for place in range(len(found)):
            found[place].index_add_(0, tokens[:, place], shares)
            alike = self._here[place] / self._here[place].sum()
            found[place] += self._ahead[place] * (local[place].exp() + alike) / 2
        known: Tensor = found / found.sum(dim=1, keepdim=True)
        return known
