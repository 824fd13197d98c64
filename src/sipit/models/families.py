"""Where each family of models keeps its blocks: model_type → attribute names.

A name here is a claim; `LanguageModel` checks it at load against the ordinary forward pass, so a
wrong row costs a refusal, never a wrong state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from torch import nn

from sipit.errors import ModelError

# one_mask: the forward pass takes one 4-D mask for all blocks, sliding where the config has a window;
# by_layer_type: it takes a dict of masks, keyed as config.layer_types; buffer: each attention module
# cuts a causal buffer by place in the cache, which packing must widen (GPT-Neo).
Masking = Literal["one_mask", "by_layer_type", "buffer"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attribute names of one layout of decoder-only transformers."""

    trunk: str  # from the causal LM to the module that owns the blocks, dotted
    blocks: str = "layers"  # the ModuleList of blocks in the trunk
    final: tuple[str, ...] = ("norm",)  # modules run after the last block; those that are None are skipped
    masking: Masking = "one_mask"
    positions: str | None = None  # the trunk's table of learned positions, which bounds the length of a prompt


_LLAMA = Family(trunk="model")
_LAYER_TYPES = Family(trunk="model", masking="by_layer_type")
_GPT2 = Family(trunk="transformer", blocks="h", final=("ln_f",), positions="wpe")
_GPT_NEO = Family(trunk="transformer", blocks="h", final=("ln_f",), masking="buffer", positions="wpe")
_GPT_NEOX = Family(trunk="gpt_neox", final=("final_layer_norm",))
_OPT = Family(trunk="model.decoder", final=("final_layer_norm", "project_out"), positions="embed_positions")

_TEXT_PART = Family(trunk="model.language_model")  # of a model that takes images as well
_TEXT_PART_TYPES = Family(trunk="model.language_model", masking="by_layer_type")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "gemma2": _LAYER_TYPES,
    "gemma3_text": _LAYER_TYPES,
    "gemma3": _TEXT_PART_TYPES,
    "mistral3": _TEXT_PART,
    "qwen2": _LAYER_TYPES,
    "qwen3": _LAYER_TYPES,
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
}


def family_of(model: nn.Module) -> Family:
    """Return the layout of `model`: its own row of the table, else the first row that fits it.

    Raises:
        ModelError: no row fits.
    """
    config: Any = model.config
    row = FAMILIES.get(config.model_type)
    if row is not None:
        return row
    by_kind = {"sliding_attention", "chunked_attention"} & set(getattr(config, "layer_types", None) or ())
    for candidate in (_LAYER_TYPES if by_kind else _LLAMA, _GPT2, _GPT_NEOX):
        if _fits(model, candidate):
            return candidate
    raise ModelError(
        f"model type {config.model_type!r} has a layout this package does not know; supported: "
        f"{', '.join(sorted(FAMILIES))}, and others laid out like them"
    )


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path."""
    return reduce(getattr, path.split("."), model)


def _fits(model: nn.Module, family: Family) -> bool:
    try:
        trunk = module_at(model, family.trunk)
    except AttributeError:
        return False
    return isinstance(getattr(trunk, family.blocks, None), nn.ModuleList) and all(
        hasattr(trunk, name) for name in family.final
    )
