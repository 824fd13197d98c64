"""Whole prompts against the states of their last tokens: many at once, and each that comes near again exactly.

T tokens of a prompt, K last rows held (one, most often), W width of a row.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sipit.inversion.inverses.arithmetic import fast_arithmetic
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.replay import replay
from sipit.inversion.judging.tolerance import tolerance_for
from sipit.inversion.last.decode import Prompt
from sipit.models import LanguageModel
from sipit.observations import Observation

_AT_ONCE = 256  # prompts a pass
_VALUES = 1 << 26  # of the values of one pass, at most
_NEAREST = 4  # of a pass, computed again exactly whatever their distance
_REACH = 3.0  # times the largest error of fast arithmetic seen, within which a distance is computed again
_FIRST_ERROR = 0.02  # of the state's norm, until one is seen


@dataclass(kw_only=True)
class LastJudge:
    """Runs whole prompts and measures how far their last states lie from the observed ones."""

    lm: LanguageModel
    seen: Observation
    budget: float  # seconds: no pass starts after them
    meter: Meter = field(default_factory=Meter)
    tried: dict[Prompt, float] = field(default_factory=dict)  # prompt → distance, exact where it is near
    fitting: list[Prompt] = field(default_factory=list)  # that lie within tolerance by an ordinary pass
    best: Prompt = ()  # that came nearest
    on_tried: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        self._observed = self.seen.states.to(self.lm.device).float()  # (K, W)
        self._norm = float(self._observed.norm())
        self._error = _FIRST_ERROR
        self._limits: dict[int, float] = {}  # length → tolerance
        self._began = time.perf_counter()

    @property
    def is_over(self) -> bool:
        """Whether the time is up, or a prompt was found."""
        return bool(self.fitting) or self.seconds >= self.budget

    @property
    def seconds(self) -> float:
        """How long the search has taken, without what was paused."""
        return time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent within."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped

    def nearest(self, n: int) -> list[Prompt]:
        """Return the n prompts that came nearest."""
        return heapq.nsmallest(n, self.tried, key=self.tried.__getitem__)

    def score(self, prompts: Iterable[Prompt], *, to_the_end: bool = False) -> None:
        """Try prompts, those first that come first; stop after the pass that finds one or ends the time."""
        groups: dict[int, list[Prompt]] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.tried and len(prompt) >= self.seen.seq_len:
                group = groups.setdefault(len(prompt), [])
                group.append(prompt)
                if len(group) == self._at_once(len(prompt)):
                    if not to_the_end and self.is_over and self.tried:
                        return
                    self._pass(groups.pop(len(prompt)))
        for group in groups.values():
            if not to_the_end and self.is_over and self.tried:
                return
            self._pass(group)

    def run(self, ids: Tensor) -> Tensor | None:
        """Try prompts of one length in the model's own arithmetic; return the states of their last tokens.

        (N, T) → (N, W) float32; None once the time is up or a fit was found.
        """
        states = []
        for part in ids.split(self._at_once(ids.shape[1])):
            if self.is_over:
                return None
            states.append(self._pass(list(map(tuple, part.tolist())), is_exact=True))
        return torch.cat(states)

    @property
    def last_row(self) -> Tensor:
        """The observed state of the last token. (W,) float32."""
        return self._observed[-1]

    def _at_once(self, length: int) -> int:
        return max(1, min(_AT_ONCE, _VALUES // (length * self.seen.d_model)))

    def _pass(self, prompts: list[Prompt], *, is_exact: bool = False) -> Tensor:
        """Measure prompts of one length, in fast arithmetic first; those that may fit again, as the model computes.

        Returns:
            (B, W) float32 states of their last tokens, as they were computed first.
        """
        ids = torch.tensor(prompts)  # (B, T)
        limit = self._limit(ids.shape[1])
        if is_exact:
            states = self._states(ids)
            distances = self._distances(states)
            again = (distances <= 2 * limit).nonzero()[:, 0]
        else:
            with fast_arithmetic(self.lm.device, self.lm.dtype):
                states = self._states(ids)
            distances = self._distances(states)
            radius = torch.tensor(limit + _REACH * self._error * self._norm)
            again = distances.argsort()[: max(_NEAREST, int((distances <= radius).sum()))]
            exact = self._distances(self._states(ids[again]))
            self._error = max(self._error, float((exact - distances[again]).abs().max()) / self._norm)
            distances[again] = exact
        for prompt, distance in zip(prompts, distances.tolist(), strict=True):
            self.tried[prompt] = distance
            if distance < self.tried.get(self.best, float("inf")):
                self.best = prompt
        for place in again.tolist():
            if float(distances[place]) <= 2 * limit:
                self._judge(prompts[place])
        self.meter.n_checked += len(prompts)
        if self.on_tried is not None:
            self.on_tried(len(self.tried))
        return states[:, -1]

    def _states(self, ids: Tensor) -> Tensor:
        """Return the states of each prompt's last K tokens. (B, T) → (B, K, W) float32."""
        model = self.lm.cut(self.seen.cut, seq_len=ids.shape[1])
        self.meter.spend(ids.numel(), self.seen.layer)
        return model.ordinary_batch(ids)[:, -self.seen.seq_len :].float()

    def _distances(self, states: Tensor) -> Tensor:
        """Return how far last states lie from the observed ones, L2. (B, K, W) → (B,)."""
        gap: Tensor = states - self._observed
        if self.seen.is_partial and self.seen.half_step is not None:
            gap = gap.masked_fill(self.seen.half_step.isinf().to(gap.device), 0.0)
        distances: Tensor = torch.linalg.vector_norm(gap.flatten(1), dim=1)
        return distances.cpu()

    def _limit(self, length: int) -> float:
        """Return the largest distance that arithmetic and rounding explain, over all rows."""
        if length not in self._limits:
            self._limits[length] = float(tolerance_for(self.lm, self.seen.ending_at(length)).total.norm())
        return self._limits[length]

    def _judge(self, prompt: Prompt) -> None:
        """Let an ordinary pass decide."""
        found = replay(self.lm, self.seen.ending_at(len(prompt)), torch.tensor(prompt))
        self.meter.spend(found.block_tokens, 1)
        if bool((found.over <= 0).all()):
            self.fitting.append(prompt)
