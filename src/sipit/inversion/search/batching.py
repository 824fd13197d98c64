"""Drive searches to their end: one, or several of the same cut that share every packed pass.

A pass has a cost of its own, whatever it checks, so prompts whose passes are small gain by sharing
them. What is accepted does not depend on it: tokens of different prompts do not see each other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.inversion.evidence.cost import cost_of
from sipit.inversion.evidence.result import Inversion, decisive_tolerance
from sipit.inversion.inverses.completed import completed
from sipit.inversion.judging.check import PackedCheck
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.tolerance import tolerance_for
from sipit.inversion.proposals import Hinted, SearchView, proposal_for
from sipit.inversion.proposals.price import pass_price
from sipit.inversion.search.belonging import require_belongs
from sipit.inversion.search.options import Progress, SearchOptions
from sipit.inversion.search.prompt_search import PromptSearch
from sipit.inversion.search.tree import Tree
from sipit.models import LanguageModel, PackedRow
from sipit.observations import Observation

_PREFIX_TOKENS = 512  # of a known prefix that are run at once
_SHARED_TOKENS = 1024  # of all prompts that share a row: each packed token looks at the prefixes of all


def search(lm: LanguageModel, seen: Observation, options: SearchOptions) -> Inversion:
    """Invert one observation."""
    return next(search_together(lm, [seen], options, n_slots=1))


def search_events(
    lm: LanguageModel, seen: Observation, options: SearchOptions | None = None
) -> Iterator[Progress | Inversion]:
    """Yield where the search of one observation stands after each packed pass, and its inversion at last.

    The search rests between two of them, and ends where nobody asks for the next one.

    Raises:
        ShapeError, MismatchError: the observation cannot be this model's.
    """
    scheduler = BatchScheduler(lm, options or SearchOptions(), n_slots=1)
    scheduler.begin(0, seen)
    while not (done := scheduler.step()):
        yield from scheduler.progress()
    yield done[0]


def search_together(
    lm: LanguageModel, observations: Sequence[Observation], options: SearchOptions, *, n_slots: int
) -> Iterator[Inversion]:
    """Yield the inversion of each observation, in their order; up to `n_slots` share the passes.

    Only observations of the same layer and site share them, and none starts before it is among the
    n_slots next to be yielded, so that an interruption loses little.

    Raises:
        ShapeError, MismatchError: an observation cannot be this model's; raised in its turn, after those before it.
    """
    scheduler = BatchScheduler(lm, options, n_slots)
    waiting = deque(observations)
    done: dict[int, Inversion] = {}
    n_begun = n_yielded = 0
    refused: Exception | None = None
    while n_yielded < len(observations):
        while waiting and refused is None and n_begun - n_yielded < n_slots and scheduler.has_room_for(waiting[0]):
            try:
                scheduler.begin(n_begun, waiting.popleft())
            except Exception as error:  # noqa: BLE001  raised again below, in its turn
                refused = error
            n_begun += refused is None
        if refused is not None and n_yielded == n_begun:
            raise refused
        done |= scheduler.step()
        while n_yielded in done:
            yield done.pop(n_yielded)
            n_yielded += 1


@dataclass(kw_only=True)
class _Slot:
    """One search and its share of the row."""

    number: int  # of the observation
    lane: int
    seen: Observation
    run: PromptSearch
    seconds: float  # of the work done for this search alone, and its share of the passes
    tree: Tree | None = field(init=False, default=None)  # planned, not yet checked


def gapless(seen: Observation) -> Observation:
    """Return an observation with a row of zeros at each position that none is held of; itself where there is none."""
    if seen.is_complete:
        return seen
    states, rows = seen.states, torch.tensor(seen.positions, device=seen.states.device)
    whole = states.new_zeros(seen.n_positions, seen.d_model).index_copy(0, rows, states)
    half = seen.half_step
    if half is not None:
        half = half.new_zeros(whole.shape).index_copy(0, rows.to(half.device), half)
    return replace(seen, states=whole, half_step=half, positions=())


def _with_prefix(seen: Observation, row: PackedRow, lane: int, meter: Meter) -> Observation:
    """Return an observation as if the rows of its known prefix had been observed too.

    One pass of the prefix computes them, and leaves its keys in the row.
    """
    if not seen.known_prefix:
        return seen
    ids = torch.tensor(seen.known_prefix)
    parts = ids.split(_PREFIX_TOKENS)
    rows = [row.extend(part, position=i * _PREFIX_TOKENS, lane=lane).cpu() for i, part in enumerate(parts)]  # (Q, W)
    meter.spend(len(ids), seen.layer)
    most = torch.finfo(seen.states.dtype).max
    states = torch.cat(rows).double().clamp(-most, most).to(seen.states.dtype)
    half = seen.half_step
    return replace(
        seen,
        states=torch.cat([states, seen.states.cpu()]),
        half_step=None if half is None else torch.cat([half.new_zeros(states.shape), half]).cpu(),
        known_prefix=(),
        positions=(*range(len(ids)), *seen.positions),
    )


class BatchScheduler:
    """Searches that share one row of packed passes."""

    def __init__(self, lm: LanguageModel, options: SearchOptions, n_slots: int) -> None:
        self._lm = lm
        self._options = options
        self._n_slots = n_slots
        self._slots: deque[_Slot] = deque()  # those that waited longest first

    def has_room_for(self, seen: Observation) -> bool:
        """Whether a search may join those under way."""
        if not self._slots:
            return True
        others = [slot.seen for slot in self._slots]
        return (
            len(others) < self._n_slots
            and seen.cut == others[0].cut
            and self._lm.regime(seen.n_positions) == self._lm.regime(others[0].n_positions)
            and seen.n_positions + sum(other.n_positions for other in others) <= _SHARED_TOKENS
        )

    def begin(self, number: int, seen: Observation) -> None:
        """Start a search."""
        lm, options = self._lm, self._options
        require_belongs(lm, seen)
        if not seen.is_complete and options.policy != "auto":
            raise OptionError(
                f"policy {options.policy!r} reads no row ahead, which positions without a row need; use policy 'auto'"
            )
        if any(not 0 <= token_id < lm.vocab_size for token_id in options.hint):
            raise OptionError(f"hint holds a token id outside the vocabulary (0 to {lm.vocab_size - 1})")
        started = time.perf_counter()
        under_way = [slot.run.view.check.row for slot in self._slots]
        row = under_way[0] if under_way else lm.cut(seen.cut, seq_len=seen.n_positions).row()
        lane = next(i for i in range(self._n_slots) if i not in {other.lane for other in self._slots})
        meter = Meter()
        held = _with_prefix(seen, row, lane, meter)
        whole, tolerance = gapless(held), tolerance_for(lm, held).at(held.positions)
        is_held = torch.zeros(seen.n_positions, dtype=torch.bool)
        is_held[list(held.positions)] = True
        check = PackedCheck(lm, whole, tolerance, meter, noise=options.noise, row=row, lane=lane)
        generator = torch.Generator().manual_seed(options.seed)
        price = pass_price(lm, self._n_slots)
        prefix = list(seen.known_prefix)
        view = SearchView(
            lm=lm,
            seen=whole,
            check=check,
            meter=meter,
            generator=generator,
            price=price,
            values=completed(lm, whole, check.observed, range(seen.n_positions)),
            is_held=is_held,
            prefix=prefix,
        )
        proposal = proposal_for(options.policy, view, use_fit=options.use_fit)
        if len(options.hint):
            proposal = Hinted(view, proposal, [*seen.known_prefix, *options.hint])
        run = PromptSearch(
            view=view,
            proposal=proposal,
            exhaustive=options.exhaustive,
            max_batch=options.max_batch,
            patience=options.patience,
        )
        self._slots.append(
            _Slot(
                number=number,
                lane=lane,
                seen=seen,
                run=run,
                seconds=time.perf_counter() - started,
            )
        )

    def step(self) -> dict[int, Inversion]:
        """Run one packed pass; return the searches that came to their end, by number."""
        found = {}
        room = max(1, self._options.max_batch // len(self._slots)) if self._slots else None  # so that all share a pass
        for slot in list(self._slots):
            with _timed(slot):
                slot.tree = slot.tree or slot.run.plan(room)
                while slot.tree is None and slot.run.is_aside:
                    slot.run.step_aside()
                    slot.tree = slot.run.plan(room)
            if slot.tree is None:
                self._slots.remove(slot)
                slot.run.view.check.row.drop(slot.lane)
                found[slot.number] = self._inversion(slot)
        if self._slots:
            self._pass(self._fill_batch())
        return found

    def _fill_batch(self) -> list[_Slot]:
        """Take the slots whose planned tokens fit in one pass; at least one."""
        chosen: list[_Slot] = []
        n_tokens = 0
        while self._slots:
            tree = self._slots[0].tree
            assert tree is not None
            n_tokens += len(tree.token_ids)
            if chosen and n_tokens > self._options.max_batch:
                break
            chosen.append(self._slots.popleft())
        self._slots.extend(chosen)
        return chosen

    def _pass(self, slots: list[_Slot]) -> None:
        started = time.perf_counter()
        row = slots[0].run.view.check.row
        trees = [slot.tree for slot in slots if slot.tree is not None]
        sizes = [len(tree.token_ids) for tree in trees]
        lane_ids = torch.cat([slot.run.view.check.lanes(n) for slot, n in zip(slots, sizes, strict=True)])
        states = row.run(
            torch.cat([tree.token_ids for tree in trees]),
            torch.cat([tree.positions for tree in trees]),
            _side_by_side(trees),
            lanes=lane_ids,
        )  # (Q, D)
        seconds = time.perf_counter() - started
        kept: list[int] = []
        first = 0
        for slot, tree, part in zip(slots, trees, states.split(sizes), strict=True):
            slot.seconds += seconds * len(part) / len(states)
            with _timed(slot):
                kept += [first + column for column in slot.run.walk(tree, part)]
            slot.tree = None
            first += len(part)
        row.keep(kept)
        for slot in slots:
            with _timed(slot):
                slot.run.settle()
            if self._options.on_progress is not None:
                self._options.on_progress(_progress(slot))

    def progress(self) -> list[Progress]:
        """Return where each search that is not at its end stands."""
        return [_progress(slot) for slot in self._slots]

    def _inversion(self, slot: _Slot) -> Inversion:
        lm, seen, run = self._lm, slot.seen, slot.run
        meter, found = run.view.meter, run.view.prefix[len(seen.known_prefix) :]
        return Inversion(
            model=lm.name,
            fingerprint=lm.fingerprint,
            layer=seen.layer,
            site=seen.site,
            policy=self._options.policy,
            verdict=run.verdict(),
            text=lm.decode(found),
            input_ids=tuple(found),
            known_prefix=seen.known_prefix,
            seq_len=seen.n_sought,
            tolerance=decisive_tolerance(run.evidence, run.miss),
            noise=self._options.noise,
            **cost_of(lm, seen, meter, slot.seconds),
            observation_sha256=seen.digest(),
            observation_dtype=seen.dtype,
            model_dtype=lm.arithmetic,
            positions=tuple(run.evidence),
            miss=run.miss,
        )


def _progress(slot: _Slot) -> Progress:
    meter = slot.run.view.meter
    return Progress(
        seq_len=slot.seen.n_sought,
        input_ids=tuple(slot.run.view.prefix[len(slot.seen.known_prefix) :]),
        n_checked=meter.n_checked,
        n_passes=meter.n_passes,
        block_tokens=meter.block_tokens,
        seconds=slot.seconds,
        positions=tuple(slot.run.evidence),
    )


@contextmanager
def _timed(slot: _Slot) -> Iterator[None]:
    """Charge the time of some work to one search."""
    started = time.perf_counter()
    yield
    slot.seconds += time.perf_counter() - started


def _side_by_side(trees: Sequence[Tree]) -> Tensor | None:
    """Return who attends whom where each tree attends itself alone. (Q, Q); None: each token is alone."""
    if all(tree.attends is None for tree in trees):
        return None
    blocks = [torch.eye(len(t.token_ids), dtype=torch.bool) if t.attends is None else t.attends for t in trees]
    return cast(Tensor, torch.block_diag(*blocks))
