"""The same model in another dtype, for states that a pass in that dtype left."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sipit.errors import OptionError
from sipit.models.language_model import LanguageModel
from sipit.models.quantized import is_quantized


def in_dtype(lm: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Return the model with its weights rounded to a dtype, or widened to it; itself where they are of it. Made once.

    It is a copy, which takes the memory of the model's weights in that dtype.

    Raises:
        OptionError: the weights are held in integers, which no dtype says how to round.
    """
    if dtype == lm.dtype:
        return lm
    if is_quantized(lm.model):
        raise OptionError(
            f"model {lm.name!r} is held quantised, so it cannot be had in {str(dtype).removeprefix('torch.')} as well; "
            "load it without --quantize"
        )

    def made() -> LanguageModel:
        model: nn.Module = copy.deepcopy(lm.model).to(dtype)
        return LanguageModel(model, lm.tokenizer, name=lm.name)

    return lm.derived(("in dtype", dtype), made)
