"""Climbs towards a collision from the pairs of prompts whose states lie closest, but for those of equal states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sipit.collisions import (
    Climb,
    FamilyResult,
    StateFolder,
    climb,
    closest_pairs,
    float64_distances,
    in_float64,
    last_states,
)
from sipit.models import LanguageModel
from sipit.observations import Cut

_SAME = 1e-6  # of the float32 distance: what is left of it in float64 where only rounding was between two states


@dataclass(frozen=True, kw_only=True)
class Start:
    """A pair of prompts to climb from."""

    family: str  # where the pair comes from
    cut: Cut
    first_ids: list[int]
    second_ids: list[int]


def exact_distances(lm: LanguageModel, results: Sequence[FamilyResult]) -> list[float | None]:
    """Return the distance in float64 arithmetic of each result's closest pair; None where there is none."""
    wide = in_float64(lm)
    found: list[float | None] = []
    for result in results:
        pairs = [(torch.tensor(p.first_ids), torch.tensor(p.second_ids)) for p in result.pairs[:1]]
        found += float64_distances(wide, pairs, Cut(result.layer, result.site)) or [None]
    return found


def is_rounding(distance: float, exact: float) -> bool:
    """Whether a distance is rounding alone: of two states that differ, next to nothing of it is left in float64."""
    return distance > 0 and exact < _SAME * distance


def starts_of_families(results: Sequence[FamilyResult], exact: Sequence[float | None]) -> list[Start]:
    """Return the closest pair of each family and layer that is not equal already. `exact` as `exact_distances` gave."""
    return [
        Start(
            family=result.family,
            cut=Cut(result.layer, result.site),
            first_ids=result.pairs[0].first_ids,
            second_ids=result.pairs[0].second_ids,
        )
        for result, distance in zip(results, exact, strict=True)
        if result.pairs and distance is not None and distance > _SAME * result.pairs[0].distance
    ]


def starts_of_survey(lm: LanguageModel, folder: StateFolder, cuts: Sequence[Cut], *, n: int) -> list[Start]:
    """Return the n closest pairs of a survey at each layer, those left out that are equal in exact arithmetic."""
    wide = in_float64(lm)
    starts = []
    for cut in cuts:
        for first, second in closest_pairs(folder, cut, n=n):
            a, b = last_states(lm, [first, second], [cut])[0].double()
            if float64_distances(wide, [(first, second)], cut)[0] > _SAME * float((a - b).norm()):
                starts.append(Start(family="survey", cut=cut, first_ids=first.tolist(), second_ids=second.tolist()))
    return starts


def climbs_from(
    lm: LanguageModel, starts: Sequence[Start], *, rounds: int, threshold: float, seed: int
) -> Iterator[tuple[Start, Climb]]:
    """Climb from each pair, with draws of its own from the same seed."""
    for start in starts:
        first, second = torch.tensor(start.first_ids), torch.tensor(start.second_ids)
        draws = torch.Generator().manual_seed(seed)
        yield start, climb(lm, first, second, start.cut, rounds=rounds, threshold=threshold, generator=draws)
