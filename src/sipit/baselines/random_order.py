"""The paper's BruteForce: candidates uniformly at random, without replacement."""

from __future__ import annotations

from sipit.inversion import Inversion, OnProgress, invert
from sipit.models import LanguageModel
from sipit.observations import Observation


def random_order(
    lm: LanguageModel, seen: Observation, *, seed: int = 0, on_progress: OnProgress | None = None
) -> Inversion:
    """Invert one observation. Source: arXiv 2510.15511, Alg. 2."""
    return invert(lm, seen, policy="random", seed=seed, on_progress=on_progress)
