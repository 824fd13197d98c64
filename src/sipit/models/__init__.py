"""A causal language model as this project sees it."""

from sipit.models.language_model import LanguageModel
from sipit.models.loading import load
from sipit.models.other_dtype import in_dtype
from sipit.models.packed_row import PackedRow
from sipit.models.prepacked import PrepackedMatrix
from sipit.models.truncated import TappedModel, TruncatedModel

__all__ = ["LanguageModel", "PackedRow", "PrepackedMatrix", "TappedModel", "TruncatedModel", "in_dtype", "load"]
