"""Are there two prompts with the same state? Closest pairs decided exactly, at scale."""

from sipit.collisions.capture import capture_states
from sipit.collisions.climbing import Climb, climb
from sipit.collisions.constructed import ConstructedCase, constructed_cases
from sipit.collisions.continuations import ContinuationSurvey, capture_continuations, continuations
from sipit.collisions.families import FamilyResult, family_prompts, sample_texts, survey_families
from sipit.collisions.farthest import farthest_pair
from sipit.collisions.margins import MarginSurvey, margins
from sipit.collisions.nearest import NearPair, PairSearch, nearest_pairs, search_between, search_pairs
from sipit.collisions.precision import PrecisionResult, float64_distances, in_float64, precision_survey
from sipit.collisions.spread import Spread, full_spread, sampled_spread
from sipit.collisions.states import last_states
from sipit.collisions.store import StateFolder
from sipit.collisions.survey import LayerSurvey, closest_prompts, survey

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
    "closest_prompts",
    "constructed_cases",
    "continuations",
    "family_prompts",
    "farthest_pair",
    "float64_distances",
    "full_spread",
    "in_float64",
    "last_states",
    "margins",
    "nearest_pairs",
    "precision_survey",
    "sample_texts",
    "sampled_spread",
    "search_between",
    "search_pairs",
    "survey",
    "survey_families",
]
