"""What was checked at one position, and what of it is nearest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sipit.inversion.evidence.result import MOST_RIVALS, Candidate
from sipit.inversion.judging.check import Checked
from sipit.models import LanguageModel


class Outcome(NamedTuple):
    """What the check says of one candidate."""

    token_id: int
    distance: float
    fits: bool
    is_near: bool


def outcomes_of(checked: Checked) -> list[Outcome]:
    """Return what a packed pass says of each token, in its order, without one call a token."""
    columns = (checked.token_ids, checked.distances, checked.fits, checked.is_near)
    return [Outcome(*one) for one in zip(*(column.tolist() for column in columns), strict=True)]


class Trials:
    """The candidates checked at one position: mostly a handful, at most the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        self._untried = torch.ones(vocab_size, dtype=torch.bool)  # (V,) but for what is tried since it was asked for
        self._since: list[int] = []
        self._tried: set[int] = set()
        self._outcomes: list[Outcome] = []  # a token that was run again stands here again
        self._best: Outcome | None = None

    @property
    def n_checked(self) -> int:
        """Tokens checked, each counted once."""
        return len(self._tried)

    @property
    def untried(self) -> Tensor:
        """Whether each token is still to be checked. (V,) bool."""
        if self._since:
            self._untried[self._since] = False
            self._since = []
        return self._untried

    def __contains__(self, token_id: int) -> bool:
        return token_id in self._tried

    def add(self, outcomes: Iterable[Outcome]) -> None:
        for one in outcomes:
            self._outcomes.append(one)
            self._tried.add(one.token_id)
            self._since.append(one.token_id)
            if self._best is None or _order(one) < _order(self._best):
                self._best = one

    def best(self) -> Outcome:
        """Return the nearest token that may be accepted, else the nearest of all."""
        assert self._best is not None
        return self._best

    def nearest(self, n: int) -> list[int]:
        """Return the nearest tokens checked, the nearest first."""
        ordered = sorted(self._outcomes, key=lambda one: one.distance)
        return list(dict.fromkeys(one.token_id for one in ordered))[:n]

    def runner_up(self, token_id: int) -> float | None:
        """Return the distance of the nearest other token checked."""
        return min((one.distance for one in self._outcomes if one.token_id != token_id), default=None)

    def rivals(self, token_id: int, *, within: float = 0.0) -> list[tuple[int, float]]:
        """Return other tokens that may be accepted too, or lie within a distance, the nearest first."""
        found = [one for one in self._outcomes if (one.is_near or one.distance <= within) and one.token_id != token_id]
        nearest: dict[int, float] = {}  # a token that was run again beside others stands here once, as it was nearest
        for one in sorted(found, key=lambda one: one.distance):
            nearest.setdefault(one.token_id, one.distance)
        return list(nearest.items())

    def take_back(self, distance: float) -> Tensor:
        """Forget the tokens tried within a distance, as if they had not been; return them, nearest first. (N,)."""
        back = sorted((one for one in self._outcomes if one.distance <= distance), key=lambda one: one.distance)
        kept = [one for one in self._outcomes if not one.distance <= distance]
        self._untried.fill_(True)
        self._tried, self._since, self._outcomes, self._best = set(), [], [], None
        self.add(kept)
        return torch.tensor(list(dict.fromkeys(one.token_id for one in back)), dtype=torch.long)


def _order(one: Outcome) -> tuple[bool, float]:
    return not one.is_near, one.distance


def named(lm: LanguageModel, rivals: Sequence[tuple[int, float]]) -> tuple[Candidate, ...]:
    """Return other tokens that fit, (token id, distance) each, as evidence names them: the first few."""
    return tuple(Candidate(token_id=i, token=lm.decode([i]), distance=d) for i, d in rivals[:MOST_RIVALS])
