"""Vocabulary matching: candidates by the model's own next-token probabilities, in growing batches."""

from __future__ import annotations

from sipit.inversion import Inversion, OnProgress, invert
from sipit.models import LanguageModel
from sipit.observations import Observation


def vocabulary_matching(
    lm: LanguageModel, seen: Observation, *, seed: int = 0, on_progress: OnProgress | None = None
) -> Inversion:
    """Invert one observation. Source: arXiv 2505.18332."""
    return invert(lm, seen, policy="likely", seed=seed, on_progress=on_progress)
