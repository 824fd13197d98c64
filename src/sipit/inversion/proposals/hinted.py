"""Try a guessed prompt first: an earlier run's prefix, a known template. The check decides as ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sipit.inversion.judging.check import Checked
from sipit.inversion.proposals.proposal import Draft, Guesses, Proposal, SearchView


class Hinted:
    """A proposal that offers a guess of the prompt until the guess is wrong, then hands over to another.

    A right guess costs what an ordinary forward pass of it costs; a wrong one at most one packed pass.
    """

    def __init__(self, view: SearchView, inner: Proposal, hint: Sequence[int]) -> None:
        self.view = view
        self._inner = inner
        self._hint = torch.tensor(list(hint), dtype=torch.long)
        self._has_begun = False  # whether the inner proposal has begun at this position

    @property
    def batch_limit(self) -> int | None:
        return None if self._is_open else self._inner.batch_limit

    @property
    def _is_open(self) -> bool:
        return self.view.position < len(self._hint)

    def begin(self) -> None:
        self._has_begun = False

    def next(self, n: int, untried: Tensor) -> Tensor:
        if self._is_open:
            guess = self._hint[self.view.position : self.view.position + 1]
            if bool(untried[guess]):
                return guess
            self._hint = self._hint[:0]  # it was wrong here; what follows it is worth nothing
        self._begin_inner()
        return self._inner.next(n, untried)

    def draft(self) -> Draft | None:
        if self._is_open:
            return Draft(here=[1.0], ahead=self._ahead())
        return self._inner.draft()

    def guesses(self, position: int, n: int) -> Tensor:
        return self._inner.guesses(position, n)

    def learn(self, checked: Checked) -> None:
        self._begin_inner()
        self._inner.learn(checked)

    def overhear(self, position: int, checked: Checked) -> None:
        self._inner.overhear(position, checked)

    def settle(self, token_id: int) -> None:
        if self._has_begun:
            self._inner.settle(token_id)

    def _begin_inner(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._inner.begin()

    def _ahead(self) -> Iterator[Guesses]:
        for token_id in self._hint[self.view.position + 1 : self.view.seen.seq_len].tolist():
            yield [token_id], [1.0]
