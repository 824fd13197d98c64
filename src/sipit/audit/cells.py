"""The cells of an audit, and what the prompts tried in them amount to. Knows no models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean, median
from typing import Any

_Z = 1.959963984540054  # of a two-sided interval of 95 %


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One cell: a place, how its rows are stored, and what was done to them."""

    layer: int
    site: str
    dtype: str
    defence: str
    strength: float
    pass_dtype: str | None = None  # of the pass that left the rows; None: the attacker's model's

    @property
    def stored(self) -> str:
        """What the rows are stored in, and what computed them where that is not the attacker's model."""
        if self.pass_dtype is None:
            return self.dtype
        article = "an" if self.pass_dtype.startswith("a") else "a"
        return f"{self.dtype} of {article} {self.pass_dtype} pass"

    @property
    def key(self) -> str:
        """A name that no other cell has."""
        return f"{self.layer} {self.site} {self.stored} {self.defence}:{self.strength:g}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the attack made of one prompt in one cell."""

    cell: str  # the plan's key
    prompt: int
    verdict: str
    tokens: int
    exact_tokens: int  # that the attack named right, each at its own position
    seconds: float
    wall_ratio: float
    kl: float | None  # nats a token, of the model that goes on from the defended rows; None where it cannot
    agreement: float | None  # share of positions at which its most likely next token stays the same
    shown: tuple[dict[str, Any], ...] = ()  # token by token: token, found, distance, runner_up, posterior

    @property
    def is_exact(self) -> bool:
        """Whether the whole prompt was given away."""
        return self.exact_tokens == self.tokens

    def record(self) -> dict[str, Any]:
        """Return the trial as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What all prompts tried in one cell amount to."""

    layer: int
    site: str
    dtype: str
    defence: str
    strength: float
    prompts: int
    exact_prompts: int
    tokens: int
    exact_tokens: int
    low: float  # of the share of prompts given away: Wilson's interval of 95 %
    high: float
    wall_ratio: float  # median over the prompts
    kl: float | None
    agreement: float | None
    seconds: float  # mean over the prompts
    pass_dtype: str | None = None
    verdicts: dict[str, int] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The cell's plan."""
        return Plan(**{one.name: getattr(self, one.name) for one in fields(Plan)})

    @property
    def rate(self) -> float:
        """Share of the prompts given away."""
        return self.exact_prompts / self.prompts

    def record(self) -> dict[str, Any]:
        """Return the cell as JSON values."""
        return {**asdict(self), "stored_as": self.plan.stored}


def cells_of(plans: Sequence[Plan], trials: Iterable[Trial]) -> list[Cell]:
    """Return what the trials of each plan amount to, in the order of the plans; those without trials are left out."""
    by_cell: dict[str, list[Trial]] = {}
    for trial in trials:
        by_cell.setdefault(trial.cell, []).append(trial)
    return [_cell(plan, by_cell[plan.key]) for plan in plans if plan.key in by_cell]


def _cell(plan: Plan, trials: Sequence[Trial]) -> Cell:
    n_exact = sum(trial.is_exact for trial in trials)
    low, high = wilson(n_exact, len(trials))
    verdicts: dict[str, int] = {}
    for trial in trials:
        verdicts[trial.verdict] = verdicts.get(trial.verdict, 0) + 1
    kls = [trial.kl for trial in trials if trial.kl is not None]
    agreements = [trial.agreement for trial in trials if trial.agreement is not None]
    return Cell(
        **asdict(plan),
        prompts=len(trials),
        exact_prompts=n_exact,
        tokens=sum(trial.tokens for trial in trials),
        exact_tokens=sum(trial.exact_tokens for trial in trials),
        low=low,
        high=high,
        wall_ratio=median(trial.wall_ratio for trial in trials),
        kl=fmean(kls) if kls else None,
        agreement=fmean(agreements) if agreements else None,
        seconds=fmean(trial.seconds for trial in trials),
        verdicts=verdicts,
    )


def wilson(n_hits: int, n: int) -> tuple[float, float]:
    """Return Wilson's interval of 95 % for a share. Source: Wilson 1927, J. Am. Stat. Assoc. 22:209."""
    share, z2 = n_hits / n, _Z * _Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if n_hits == 0 else centre - half), (1.0 if n_hits == n else centre + half)


def given_away(cells: Sequence[Cell]) -> float:
    """Return the largest share of prompts that any cell gives away; 0 where there is none."""
    return max((cell.rate for cell in cells), default=0.0)
