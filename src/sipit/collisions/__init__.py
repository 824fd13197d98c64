"""Are there two prompts with the same state? Closest pairs decided exactly, at scale."""

from sipit.collisions.capture import capture_states
from sipit.collisions.continuations import ContinuationSurvey, capture_continuations, continuations
from sipit.collisions.farthest import farthest_pair
from sipit.collisions.margins import MarginSurvey, margins
from sipit.collisions.nearest import NearPair, PairSearch, nearest_pairs, search_between, search_pairs
from sipit.collisions.spread import Spread, full_spread, sampled_spread
from sipit.collisions.states import last_states
from sipit.collisions.store import StateFolder
from sipit.collisions.survey import LayerSurvey, closest_prompts, survey

__all__ = [
    "ContinuationSurvey",
    "LayerSurvey",
    "MarginSurvey",
    "NearPair",
    "PairSearch",
    "Spread",
    "StateFolder",
    "capture_continuations",
    "capture_states",
    "closest_prompts",
    "continuations",
    "farthest_pair",
    "full_spread",
    "last_states",
    "margins",
    "nearest_pairs",
    "sampled_spread",
    "search_between",
    "search_pairs",
    "survey",
]
