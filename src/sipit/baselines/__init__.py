"""Published methods of exact inversion, to measure ours against on the same observations.

All of them run on this package's packed check, stop at the observed layer and keep the prefix
cached, so that a comparison is about the order of candidates alone.
"""

from sipit.baselines.random_order import random_order
from sipit.baselines.reference_sipit import reference_sipit
from sipit.baselines.vocabulary_matching import vocabulary_matching

__all__ = ["random_order", "reference_sipit", "vocabulary_matching"]
