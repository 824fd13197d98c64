"""Are there two prompts with the same state? Closest pairs decided exactly, at scale.

Names load on first use, so that searching arrays waits for no language model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sipit.collisions.capture import capture_states as capture_states
    from sipit.collisions.climbing import Climb as Climb
    from sipit.collisions.climbing import climb as climb
    from sipit.collisions.constructed import ConstructedCase as ConstructedCase
    from sipit.collisions.constructed import constructed_cases as constructed_cases
    from sipit.collisions.continuations import ContinuationSurvey as ContinuationSurvey
    from sipit.collisions.continuations import capture_continuations as capture_continuations
    from sipit.collisions.continuations import survey_continuations as survey_continuations
    from sipit.collisions.families import FamilyResult as FamilyResult
    from sipit.collisions.families import family_prompts as family_prompts
    from sipit.collisions.families import sample_texts as sample_texts
    from sipit.collisions.families import similar_texts as similar_texts
    from sipit.collisions.families import survey_families as survey_families
    from sipit.collisions.farthest import farthest_pair as farthest_pair
    from sipit.collisions.margins import MarginSurvey as MarginSurvey
    from sipit.collisions.margins import survey_margins as survey_margins
    from sipit.collisions.nearest import NearPair as NearPair
    from sipit.collisions.nearest import PairSearch as PairSearch
    from sipit.collisions.nearest import nearest_pairs as nearest_pairs
    from sipit.collisions.nearest import search_between as search_between
    from sipit.collisions.nearest import search_pairs as search_pairs
    from sipit.collisions.precision import PrecisionResult as PrecisionResult
    from sipit.collisions.precision import float64_distances as float64_distances
    from sipit.collisions.precision import in_float64 as in_float64
    from sipit.collisions.precision import precision_survey as precision_survey
    from sipit.collisions.spread import Spread as Spread
    from sipit.collisions.spread import full_spread as full_spread
    from sipit.collisions.spread import sampled_spread as sampled_spread
    from sipit.collisions.states import last_states as last_states
    from sipit.collisions.store import StateFolder as StateFolder
    from sipit.collisions.survey import LayerSurvey as LayerSurvey
    from sipit.collisions.survey import closest_pairs as closest_pairs
    from sipit.collisions.survey import closest_prompts as closest_prompts
    from sipit.collisions.survey import survey_layers as survey_layers

_HOMES = {
    "Climb": "climbing",
    "ConstructedCase": "constructed",
    "ContinuationSurvey": "continuations",
    "FamilyResult": "families",
    "LayerSurvey": "survey",
    "MarginSurvey": "margins",
    "NearPair": "nearest",
    "PairSearch": "nearest",
    "PrecisionResult": "precision",
    "Spread": "spread",
    "StateFolder": "store",
    "capture_continuations": "continuations",
    "capture_states": "capture",
    "climb": "climbing",
    "closest_pairs": "survey",
    "closest_prompts": "survey",
    "constructed_cases": "constructed",
    "survey_continuations": "continuations",
    "family_prompts": "families",
    "farthest_pair": "farthest",
    "float64_distances": "precision",
    "full_spread": "spread",
    "in_float64": "precision",
    "last_states": "states",
    "survey_margins": "margins",
    "nearest_pairs": "nearest",
    "precision_survey": "precision",
    "sample_texts": "families",
    "sampled_spread": "spread",
    "search_between": "nearest",
    "similar_texts": "families",
    "search_pairs": "nearest",
    "survey_layers": "survey",
    "survey_families": "families",
}

__all__ = [
    "Climb",
    "ConstructedCase",
    "ContinuationSurvey",
    "FamilyResult",
    "LayerSurvey",
    "MarginSurvey",
    "NearPair",
    "PairSearch",
    "PrecisionResult",
    "Spread",
    "StateFolder",
    "capture_continuations",
    "capture_states",
    "climb",
    "closest_pairs",
    "closest_prompts",
    "constructed_cases",
    "family_prompts",
    "farthest_pair",
    "float64_distances",
    "full_spread",
    "in_float64",
    "last_states",
    "nearest_pairs",
    "precision_survey",
    "sample_texts",
    "sampled_spread",
    "search_between",
    "search_pairs",
    "similar_texts",
    "survey_continuations",
    "survey_families",
    "survey_layers",
    "survey_margins",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sipit.collisions' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sipit.collisions.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
