"""Where injectivity fails: models built to collide, their near misses, and a control left alone.

Each case names what it does to a model, what should follow, and what the ordinary search for close
pairs then finds. Nothing tells the search which prompts were made to collide. A state that is not
finite is counted as such and never as a collision.
"""

from __future__ import annotations

from dataclasses import dataclass

from sipit.collisions.constructions import LENGTH, MIN_VOCAB, Construction, Expected, constructions_on, tiny_llama
from sipit.collisions.scales import THRESHOLD, closeness
from sipit.collisions.states import OnStep, last_states
from sipit.errors import OptionError
from sipit.models import LanguageModel
from sipit.observations import Site


@dataclass(frozen=True, kw_only=True)
class ConstructedCase:
    """One construction, what should follow from it, and what was found."""

    name: str
    what: str  # was done, and why the outcome is expected
    expected: Expected
    found: bool  # whether a pair at or below the threshold was found
    layer: int
    site: Site
    dtype: str  # of the states
    n_prompts: int
    n_pairs: int  # of prompts with finite states
    n_not_finite: int  # prompts whose state holds NaN or infinity: not collisions
    n_equal: int  # pairs of states equal in every value
    n_collisions: int  # pairs at or below the threshold, the equal ones included
    threshold: float  # L2
    distance: float | None  # L2 of the closest pair; None without a pair of finite states
    relative_to_norm: float | None  # distance / mean norm of its two states
    first_ids: list[int] | None  # the closest pair's prompts
    second_ids: list[int] | None


def constructed_cases(
    lm: LanguageModel | None = None,
    *,
    threshold: float = THRESHOLD,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[ConstructedCase]:
    """Return the cases, each built on a tiny random model in float64 or, where it can be, on a copy of `lm`.

    Args:
        lm: a model to alter copies of for the cases of equal rows, rounded states and the control;
            None: tiny ones. The others need an architecture of their own. Never modified.
        threshold: largest L2 distance counted as a collision. In float32 and below rounding alone can
            exceed it; the tiny models run in float64 so that it cannot.
        seed: of weights and prompts.
        on_step: told the groups of cases done and in all.

    Raises:
        OptionError: the model has too few layers, tokens or positions.
    """
    if lm is not None and (lm.n_layers < 3 or lm.vocab_size < MIN_VOCAB or (lm.max_positions or LENGTH) < LENGTH):
        raise OptionError(
            f"constructed cases need a model of 3 layers, {MIN_VOCAB} tokens and {LENGTH} positions or more, or none; "
            f"{lm.name!r} has {lm.n_layers}, {lm.vocab_size} and {lm.max_positions or 'no limit'}"
        )
    constructions = constructions_on(lm or tiny_llama(seed), seed)
    results: list[ConstructedCase] = []
    for number, build in enumerate(constructions, start=1):
        results += [_searched(case, threshold, seed) for case in build()]
        if on_step is not None:
            on_step(number, len(constructions))
    return results


def _searched(case: Construction, threshold: float, seed: int) -> ConstructedCase:
    (states,) = last_states(case.lm, case.prompts, [case.cut])
    found = closeness(states, threshold=threshold, seed=seed)
    closest = found.pairs[0] if found.pairs else None
    return ConstructedCase(
        name=case.name,
        what=case.what,
        expected=case.expected,
        found=found.n_collisions > 0,
        layer=case.cut[0],
        site=case.cut[1],
        dtype=str(states.dtype).removeprefix("torch."),
        n_prompts=len(case.prompts),
        n_pairs=found.n_pairs,
        n_not_finite=found.n_not_finite,
        n_equal=found.n_equal,
        n_collisions=found.n_collisions,
        threshold=threshold,
        distance=closest.distance if closest else None,
        relative_to_norm=closest.relative_to_norm if closest else None,
        first_ids=case.prompts[closest.first].tolist() if closest else None,
        second_ids=case.prompts[closest.second].tolist() if closest else None,
    )
