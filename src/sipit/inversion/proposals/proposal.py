"""What a proposal is given, and what it must answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sipit.inversion.judging.check import Checked, PackedCheck
from sipit.inversion.judging.meter import Meter
from sipit.models import LanguageModel
from sipit.observations import Observation

Guesses = tuple[list[int], list[float]]  # tokens of one position, the best first, and their probabilities


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Guesses that need no recovered prefix."""

    here: list[float]  # probabilities of the candidates for the next position, in their order; fewer where unknown
    ahead: Iterator[Guesses]  # for each position after it


@dataclass(kw_only=True)
class SearchView:
    """All that a proposal may look at: the model, the observed states, the accepted prefix."""

    lm: LanguageModel
    seen: Observation
    check: PackedCheck  # for its prefix cache and observed states; proposals accept nothing
    meter: Meter
    generator: torch.Generator
    price: float  # what one more packed pass may cost in wasted tokens
    values: Tensor  # (T, W) observed values, those that are not held estimated
    is_held: Tensor  # (T,) bool: positions that a row is held of
    prefix: list[int] = field(default_factory=list)  # accepted token ids

    @property
    def position(self) -> int:
        """The position to propose for."""
        return len(self.prefix)

    @property
    def is_gapless(self) -> bool:
        """Whether a row is held of every position."""
        return bool(self.is_held.all())

    @property
    def target(self) -> Tensor:
        """The observed state at this position. (D,)."""
        return self.values[self.position]


class Proposal(Protocol):
    """An order of the vocabulary at a position, which may learn from what was checked there."""

    @property
    def batch_limit(self) -> int | None:
        """Most candidates worth checking before it is asked again; None: no limit of its own."""

    def begin(self) -> None:
        """Start a new position; `view.position` says which."""

    def next(self, n: int, untried: Tensor) -> Tensor:
        """Return up to n tokens to try, best first; none only when no untried token is left.

        Args:
            untried: (V,) bool
        """

    def draft(self) -> Draft | None:
        """Return guesses behind the first token `next` just returned; None where that needs a prefix."""

    def guesses(self, position: int, n: int) -> Tensor:
        """Return the best n tokens for a position ahead, whatever stands before it; none where that needs a prefix.

        (N,)
        """

    def learn(self, checked: Checked) -> None:
        """Take note of candidates that were checked at this position."""

    def overhear(self, position: int, checked: Checked) -> None:
        """Take note of candidates that were checked at a position ahead, behind a token that proved wrong."""

    def settle(self, token_id: int) -> None:
        """Take note of the token accepted at this position, just before the next one begins."""


class Ordered:
    """A proposal that is one fixed order of the vocabulary, made when a position begins."""

    batch_limit: int | None = None

    def __init__(self, view: SearchView) -> None:
        self.view = view
        self._order = torch.empty(0, dtype=torch.long)  # (V,)
        self._next = 0

    def order(self) -> Tensor:
        """Return the whole vocabulary in the order to try at this position. (V,)."""
        raise NotImplementedError

    def begin(self) -> None:
        self._order = self.order().cpu()
        self._next = 0

    def next(self, n: int, untried: Tensor) -> Tensor:
        while self._next < len(self._order):
            part = self._order[self._next : self._next + n]
            self._next += len(part)
            part = part[untried[part]]
            if len(part):
                return part
        return self._order[:0]

    def draft(self) -> Draft | None:
        return None

    def guesses(self, position: int, n: int) -> Tensor:
        return self._order[:0]

    def learn(self, checked: Checked) -> None:
        """Nothing to learn: the order is fixed."""

    def overhear(self, position: int, checked: Checked) -> None:
        """Nothing to learn: nothing was checked ahead."""

    def settle(self, token_id: int) -> None:
        """Nothing to learn: the next order is made afresh."""
