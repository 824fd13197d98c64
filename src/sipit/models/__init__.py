"""A causal language model as this project sees it."""

from sipit.models.language_model import LanguageModel
from sipit.models.loading import load
from sipit.models.prepacked import PrepackedMatrix
from sipit.models.truncated import PrefixCache, TappedModel, TruncatedModel

__all__ = ["LanguageModel", "PrefixCache", "PrepackedMatrix", "TappedModel", "TruncatedModel", "load"]
