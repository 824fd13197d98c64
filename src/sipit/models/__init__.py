"""A causal language model as this project sees it."""

from sipit.models.language_model import LanguageModel
from sipit.models.loading import load
from sipit.models.packed_row import PackedRow
from sipit.models.passes import PASSES, in_pass, pass_named, stored_dtype
from sipit.models.prepacked import PrepackedMatrix
from sipit.models.truncated import TappedModel, TruncatedModel

__all__ = [
    "PASSES",
    "LanguageModel",
    "PackedRow",
    "PrepackedMatrix",
    "TappedModel",
    "TruncatedModel",
    "in_pass",
    "load",
    "pass_named",
    "stored_dtype",
]
