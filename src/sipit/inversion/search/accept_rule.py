"""What is done about a position once candidates were checked there: accept one, check more first, or call it a miss.

No token is accepted because a proposal liked it, and none before what may fit beside it was checked too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sipit.inversion.evidence.result import Miss
from sipit.inversion.proposals import SearchView
from sipit.inversion.search.beside import Beside
from sipit.inversion.search.diagnosis import diagnosed
from sipit.inversion.search.trials import Outcome, Trials

_STANDS_OUT = 16.0  # a token this many times nearer than all others is worth a second look
_AMPLIFIED = 256.0  # at most this many tolerances away


@dataclass(frozen=True)
class Accept:
    """A token fits, and so does nothing else that may, or it is the nearest of what does."""

    best: Outcome


@dataclass(frozen=True)
class Retry:
    """Tokens to be run in the next pass, behind the same prefix, before anything is accepted here."""

    token_ids: Tensor  # (N,)


@dataclass
class AcceptRule:
    """Decides about one position after another of a search."""

    view: SearchView
    exhaustive: bool  # whether the whole vocabulary is always checked
    max_batch: int
    beside: Beside = field(init=False)
    _remeasured: set[int] = field(init=False, default_factory=set)  # tokens whose own noise was, at this position

    def __post_init__(self) -> None:
        self.beside = Beside(self.view.lm, self.view.check)

    def begin(self) -> None:
        """Start a position: behind another prefix, states have another noise of their own."""
        self._remeasured.clear()

    @property
    def tries_all(self) -> bool:
        """Whether the whole vocabulary is checked at this position before a token is accepted.

        Where the first position's tolerance is coarse it must be: its state is long and nearly
        constant, and the tokens nearest to it there have nothing in common. So it must where rounding
        left so little of a state that any token may fit.
        """
        position, check = self.view.position, self.view.check
        return self.exhaustive or check.is_open(position) or (position == 0 and check.is_coarse(position))

    def after_pass(self, tried: Trials, token_ids: list[int], *, is_settling: bool) -> Accept | Retry | None:
        """Decide by what was checked; None where nothing may be accepted yet.

        Args:
            tried: all that was checked at this position.
            token_ids: what the last pass ran here, and can be kept.
            is_settling: whether that was all asked for by an earlier decision.
        """
        best = tried.best()
        if not best.is_near or (self.tries_all and not is_settling):
            return None
        others = [i for i in self.beside.of(best.token_id, self.view.position) if i not in tried]
        if others:  # the next pass checks them beside it, behind the same prefix
            both = [best.token_id, *others] if self.max_batch > 1 else others
            return Retry(torch.tensor(both[: self.max_batch]))
        if best.token_id not in token_ids:  # it was checked in an earlier pass, which did not keep it
            return Retry(torch.tensor([best.token_id]))
        return Accept(best)

    def after_doubt(self, tried: Trials) -> Retry | None:
        """Where one token is far nearer than all others and yet too far, look whether its own noise explains that.

        The row must hold the prefix, and nothing that is still to be kept lies behind it.
        """
        view, check, best = self.view, self.view.check, tried.best()
        runner_up, limit = tried.runner_up(best.token_id), check.limit(view.position)
        stands_out = runner_up is not None and best.distance * _STANDS_OUT < runner_up
        if best.is_near or not stands_out or check.is_coarse(view.position) or best.distance > _AMPLIFIED * limit:
            return None
        if best.token_id in self._remeasured:
            return None
        self._remeasured.add(best.token_id)
        check.remeasure(view.prefix, best.token_id)
        limit = check.limit(view.position)
        if best.distance > limit:
            return None
        return Retry(tried.take_back(limit)[: self.max_batch])  # it explains it: check again all that lies so near

    def at_the_end(self, tried: Trials) -> Retry | Miss:
        """Decide with all tried that is to be: the nearest token is run again to be accepted, or it is a miss."""
        view, check, best = self.view, self.view.check, tried.best()
        if best.is_near:
            return Retry(torch.tensor([best.token_id]))
        runner_up, limit = tried.runner_up(best.token_id), check.limit(view.position)
        if tried.n_checked < view.lm.vocab_size:
            diagnosis = f"no more than {tried.n_checked} candidates were to be tried"
        else:
            diagnosis = diagnosed(
                view.lm,
                view.seen,
                check.observed,
                view.position,
                nearest=best.token_id,
                distance=best.distance,
                runner_up=runner_up,
                limit=limit,
            )
        return Miss(
            position=view.position,
            token_id=best.token_id,
            token=view.lm.decode([best.token_id]),
            distance=best.distance,
            tolerance=limit,
            n_checked=tried.n_checked,
            runner_up=runner_up,
            diagnosis=diagnosis,
        )
