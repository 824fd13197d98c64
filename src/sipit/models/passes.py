"""The same model as another pass computed it: weights in another dtype, or products under autocast.

For states that such a pass left. It is named by a dtype, or by "autocast-" and the dtype of `torch.autocast`.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from sipit.errors import OptionError
from sipit.models.arithmetic import AUTOCAST, under_autocast
from sipit.models.families import module_at
from sipit.models.language_model import LanguageModel
from sipit.models.quantized import is_quantized
from sipit.models.shallow import with_part
from sipit.observations import DTYPES

PASSES = (*DTYPES, *AUTOCAST)


def pass_named(name: str) -> str:
    """Return the name of a pass.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in PASSES:
        raise OptionError(f"pass dtype {name!r} is unknown; choose one of {', '.join(PASSES)}")
    return name


def stored_dtype(pass_name: str | None) -> str:
    """Return the dtype that a pass leaves its states in, by name; None: the usual one."""
    return pass_name if pass_name is not None and pass_name in DTYPES else "float32"


def in_pass(lm: LanguageModel, name: str) -> LanguageModel:
    """Return the model as a pass computes it; itself where it computes so. Made once.

    Under autocast it shares the weights; otherwise it is a copy, which takes the memory of its weights.

    Raises:
        OptionError: no pass has that name, or the weights are held in integers, which nothing says how to round.
    """
    name = pass_named(name)
    if name == lm.arithmetic:
        return lm
    if is_quantized(lm.model):
        raise OptionError(
            f"model {lm.name!r} is held quantised, so it cannot be had in {name} as well; load it without --quantize"
        )
    return lm.derived(("in pass", name), lambda: LanguageModel(_as_computed(lm, name), lm.tokenizer, name=lm.name))


def _as_computed(lm: LanguageModel, name: str) -> nn.Module:
    if name in AUTOCAST:
        return _under_autocast(lm.model, lm.family.trunk, AUTOCAST[name])
    return copy.deepcopy(lm.model).to(DTYPES[name])


def _under_autocast(model: nn.Module, trunk: str, dtype: torch.dtype) -> nn.Module:
    """Return a shallow copy whose trunk and head compute under autocast, whoever calls either."""
    part = under_autocast(module_at(model, trunk), dtype)
    return under_autocast(with_part(model, trunk, part), dtype)
