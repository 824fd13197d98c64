"""Text to fit and to measure on, and prompts of exact lengths cut from it. Knows nothing of models."""

from sipit.corpora.folders import LocalTexts
from sipit.corpora.hub import HUB_DATASETS
from sipit.corpora.named import CORPORA, Corpus, corpus
from sipit.corpora.prompts import exact_prompts, special_start
from sipit.corpora.standard_library import library_code, library_prose

__all__ = [
    "CORPORA",
    "HUB_DATASETS",
    "Corpus",
    "LocalTexts",
    "corpus",
    "exact_prompts",
    "library_code",
    "library_prose",
    "special_start",
]
