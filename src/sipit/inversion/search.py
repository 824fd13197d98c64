"""Drive searches to their end: one, or several of the same cut that share every packed pass.

A pass has a cost of its own, whatever it checks, so prompts whose passes are small gain by sharing
them. What is accepted does not depend on it: tokens of different prompts do not see each other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from sipit.errors import MismatchError, OptionError, ShapeError
from sipit.inversion.check import PackedCheck
from sipit.inversion.proposals import Hinted, Scene, proposal_for
from sipit.inversion.result import Inversion, Meter
from sipit.inversion.run import Run
from sipit.inversion.tolerance import noise_floor, tolerance_for
from sipit.inversion.tree import Tree, pass_price
from sipit.models import LanguageModel, PrefixCache
from sipit.observations import Observation

_SHARED_TOKENS = 1024  # of all prompts that share a row: each packed token looks at the prefixes of all


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a running search stands."""

    seq_len: int
    input_ids: tuple[int, ...]  # accepted so far
    n_checked: int
    block_tokens: int
    seconds: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search; see `sipit.invert`."""

    policy: str = "auto"
    noise: float = 0.0
    exhaustive: bool = False
    max_batch: int = 256
    seed: int = 0
    use_fit: bool = True
    hint: Sequence[int] = ()
    on_progress: OnProgress | None = None

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise OptionError(f"max_batch is {self.max_batch}; a packed pass needs at least 1 candidate")
        if not 0 <= self.noise < float("inf"):
            raise OptionError(f"noise is {self.noise}; it is a finite L2 distance, 0 or more")


def search(lm: LanguageModel, seen: Observation, **options: Any) -> Inversion:
    """Invert one observation; the options are those of SearchOptions."""
    return next(search_together(lm, [seen], n_lanes=1, **options))


def search_together(
    lm: LanguageModel, observations: Sequence[Observation], *, n_lanes: int, **options: Any
) -> Iterator[Inversion]:
    """Yield the inversion of each observation, in their order; up to `n_lanes` share the passes.

    Only observations of the same layer and site share them, and none starts before it is among the
    n_lanes next to be yielded, so that an interruption loses little.

    Raises:
        ShapeError, MismatchError: an observation cannot be this model's; raised in its turn, after those before it.
    """
    how = SearchOptions(**options)
    crew = _Crew(lm, how, n_lanes)
    waiting = deque(observations)
    done: dict[int, Inversion] = {}
    n_begun = n_yielded = 0
    refused: Exception | None = None
    while n_yielded < len(observations):
        while waiting and refused is None and n_begun - n_yielded < n_lanes and crew.has_room_for(waiting[0]):
            try:
                crew.begin(n_begun, waiting.popleft())
            except Exception as error:  # noqa: BLE001  raised again below, in its turn
                refused = error
            n_begun += refused is None
        if refused is not None and n_yielded == n_begun:
            raise refused
        done |= crew.step()
        while n_yielded in done:
            yield done.pop(n_yielded)
            n_yielded += 1


@dataclass(kw_only=True)
class _Lane:
    """One search and its share of the row."""

    number: int  # of the observation
    lane: int
    seen: Observation
    run: Run
    tolerance: float
    seconds: float  # of the work done for this search alone, and its share of the passes
    tree: Tree | None = field(init=False, default=None)  # planned, not yet checked


class _Crew:
    """Searches that share one row of packed passes."""

    def __init__(self, lm: LanguageModel, how: SearchOptions, n_lanes: int) -> None:
        self._lm = lm
        self._how = how
        self._n_lanes = n_lanes
        self._lanes: deque[_Lane] = deque()  # those that waited longest first
        self._cache = PrefixCache(0)

    def has_room_for(self, seen: Observation) -> bool:
        """Whether a search may join those under way."""
        if not self._lanes:
            return True
        others = [lane.seen for lane in self._lanes]
        return (
            len(others) < self._n_lanes
            and (seen.layer, seen.site) == (others[0].layer, others[0].site)
            and self._lm.regime(seen.seq_len) == self._lm.regime(others[0].seq_len)
            and seen.seq_len + sum(other.seq_len for other in others) <= _SHARED_TOKENS
        )

    def begin(self, number: int, seen: Observation) -> None:
        """Start a search."""
        lm, how = self._lm, self._how
        _check_fit(lm, seen)
        if any(not 0 <= token_id < lm.vocab_size for token_id in how.hint):
            raise OptionError(f"hint holds a token id outside the vocabulary (0 to {lm.vocab_size - 1})")
        started = time.perf_counter()
        tolerance = tolerance_for(lm, seen)
        if not self._lanes:
            self._cache = lm.cut(seen.layer, seen.site, seq_len=seen.seq_len).new_cache()
        lane = next(i for i in range(self._n_lanes) if i not in {other.lane for other in self._lanes})
        meter = Meter()
        check = PackedCheck(lm, seen, tolerance, meter, noise=how.noise, cache=self._cache, lane=lane)
        generator = torch.Generator().manual_seed(how.seed)
        price = pass_price(seen.seq_len, self._n_lanes)
        scene = Scene(lm=lm, seen=seen, check=check, meter=meter, generator=generator, price=price)
        proposal = proposal_for(how.policy, scene, use_fit=how.use_fit)
        if len(how.hint):
            proposal = Hinted(scene, proposal, how.hint)
        run = Run(scene=scene, proposal=proposal, exhaustive=how.exhaustive, max_batch=how.max_batch)
        self._lanes.append(
            _Lane(
                number=number,
                lane=lane,
                seen=seen,
                run=run,
                tolerance=float(tolerance.total.max()),
                seconds=time.perf_counter() - started,
            )
        )

    def step(self) -> dict[int, Inversion]:
        """Run one packed pass; return the searches that came to their end, by number."""
        found = {}
        for lane in list(self._lanes):
            with _timed(lane):
                lane.tree = lane.tree or lane.run.plan()
            if lane.tree is None:
                self._lanes.remove(lane)
                self._cache.drop(lane.lane)
                found[lane.number] = self._inversion(lane)
        if self._lanes:
            self._pass(self._aboard())
        return found

    def _aboard(self) -> list[_Lane]:
        """Take the lanes whose planned tokens fit in one pass; at least one."""
        chosen: list[_Lane] = []
        n_tokens = 0
        while self._lanes:
            tree = self._lanes[0].tree
            assert tree is not None
            n_tokens += len(tree.token_ids)
            if chosen and n_tokens > self._how.max_batch:
                break
            chosen.append(self._lanes.popleft())
        self._lanes.extend(chosen)
        return chosen

    def _pass(self, lanes: list[_Lane]) -> None:
        started = time.perf_counter()
        trees = [lane.tree for lane in lanes if lane.tree is not None]
        sizes = [len(tree.token_ids) for tree in trees]
        lane_ids = torch.cat([lane.run.scene.check.lanes(n) for lane, n in zip(lanes, sizes, strict=True)])
        states = lanes[0].run.scene.check.cut.packed(
            self._cache,
            torch.cat([tree.token_ids for tree in trees]),
            torch.cat([tree.positions for tree in trees]),
            _side_by_side(trees),
            lane_ids,
        )  # (Q, D)
        seconds = time.perf_counter() - started
        kept: list[int] = []
        first = 0
        for lane, tree, part in zip(lanes, trees, states.split(sizes), strict=True):
            lane.seconds += seconds * len(part) / len(states)
            with _timed(lane):
                kept += [first + column for column in lane.run.walk(tree, part)]
            lane.tree = None
            first += len(part)
        self._cache.keep(kept)
        for lane in lanes:
            with _timed(lane):
                lane.run.settle()
            self._tell(lane)

    def _tell(self, lane: _Lane) -> None:
        if self._how.on_progress is not None:
            meter = lane.run.scene.meter
            self._how.on_progress(
                Progress(
                    seq_len=lane.seen.seq_len,
                    input_ids=tuple(lane.run.scene.prefix),
                    n_checked=meter.n_checked,
                    block_tokens=meter.block_tokens,
                    seconds=lane.seconds,
                )
            )

    def _inversion(self, lane: _Lane) -> Inversion:
        lm, seen, run = self._lm, lane.seen, lane.run
        meter, prefix = run.scene.meter, run.scene.prefix
        return Inversion(
            model=lm.name,
            fingerprint=lm.fingerprint,
            layer=seen.layer,
            site=seen.site,
            policy=self._how.policy,
            verdict=run.verdict(),
            text=lm.decode(prefix),
            input_ids=tuple(prefix),
            seq_len=seen.seq_len,
            tolerance=lane.tolerance,
            noise=self._how.noise,
            seconds=lane.seconds,
            block_tokens=meter.block_tokens,
            prefill_ratio=meter.block_tokens / (seen.seq_len * max(seen.layer, 1)),
            calibration_block_tokens=noise_floor(lm, seen.layer, seen.site, seen.seq_len).block_tokens,
            n_checked=meter.n_checked,
            observation=seen.digest(),
            dtype=seen.dtype,
            model_dtype=str(lm.dtype).removeprefix("torch."),
            positions=tuple(run.evidence),
            miss=run.miss,
        )


@contextmanager
def _timed(lane: _Lane) -> Iterator[None]:
    """Charge the time of some work to one search."""
    started = time.perf_counter()
    yield
    lane.seconds += time.perf_counter() - started


def _side_by_side(trees: Sequence[Tree]) -> Tensor | None:
    """Return who sees whom where each tree sees itself alone. (Q, Q); None: each token is alone."""
    if all(tree.sees is None for tree in trees):
        return None
    blocks = [torch.eye(len(t.token_ids), dtype=torch.bool) if t.sees is None else t.sees for t in trees]
    return cast(Tensor, torch.block_diag(*blocks))


def _check_fit(lm: LanguageModel, seen: Observation) -> None:
    """Refuse an observation that cannot have come from this model."""
    lm.checked_layer(seen.layer, seen.site)
    width = lm.width(seen.site)
    if seen.d_model != width:
        raise ShapeError(
            f"states are {seen.d_model} wide, but site {seen.site!r} of model {lm.name!r} is {width} wide; "
            "name the model they were captured from"
        )
    if seen.fingerprint is not None and seen.fingerprint != lm.fingerprint:
        raise MismatchError(
            f"the states come from the model {seen.model!r} with fingerprint {seen.fingerprint[:19]}…, but "
            f"{lm.name!r} in {lm.dtype} has {lm.fingerprint[:19]}…; load that model in the dtype it was captured "
            "in, or drop the fingerprint from the observation to try anyway"
        )
    if lm.max_positions is not None and seen.seq_len > lm.max_positions:
        raise ShapeError(
            f"the observation has {seen.seq_len} positions, model {lm.name!r} only {lm.max_positions}; "
            "name the model the states were captured from"
        )
    if not seen.is_complete:
        raise MismatchError(
            f"the states start at or skip positions ({seen.seq_len} rows up to position {seen.positions[-1]}); "
            "this version needs every position from 0 on"
        )
