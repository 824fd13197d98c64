"""SIPIT as published: gradient steps on a proxy embedding, one candidate a step."""

from __future__ import annotations

from sipit.inversion import Inversion, OnProgress, invert
from sipit.models import LanguageModel
from sipit.observations import Observation


def reference_sipit(
    lm: LanguageModel, seen: Observation, *, seed: int = 0, on_progress: OnProgress | None = None
) -> Inversion:
    """Invert one observation. Source: arXiv 2510.15511, Alg. 1 and 3."""
    return invert(lm, seen, policy="gradient", seed=seed, on_progress=on_progress)
