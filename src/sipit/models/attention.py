"""Attention as packed passes and writing on need it on a CPU.

Query heads that share keys read them where they lie: the ordinary way copies all keys and values of
the prefix once a head when there is a mask. One query is two plain products: the fused kernel in
bfloat16 prepares the keys anew for it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sipit.models.shallow import rewritten

_NAME = "sipit"
_PLAIN = "sdpa"  # what it stands in for, and falls back on


def lean_attention(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module whose attention, if it is torch's own, goes by `attention`."""
    return with_attention(module, _NAME)


def with_attention(module: nn.Module, name: str) -> nn.Module:
    """Return a shallow copy of a module whose attention, if it is torch's own, goes by the one registered so."""
    configs: dict[int, Any] = {}

    def rewrite(part: nn.Module) -> nn.Module:
        config: Any = part.__dict__.get("config")
        if not hasattr(part, "is_causal") or getattr(config, "_attn_implementation", None) != _PLAIN:
            return part
        if id(config) not in configs:
            configs[id(config)] = copy.copy(config)
            configs[id(config)]._attn_implementation_internal = name
        lean = copy.copy(part)
        lean.__dict__["config"] = configs[id(config)]
        return lean

    return rewritten(module, rewrite)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention as transformers' own function over torch's does, rounding apart.

    (B, H, Q, d), (B, K, N, d), (B, K, N, e), mask (B or 1, 1, Q, N) → (B, Q, H, e), where K divides H.
    """
    is_plain = query.device.type == "cpu" and not kwargs.get("dropout") and not _UNUSUAL & kwargs.keys()
    if is_plain and query.shape[2] == 1 and key.shape[2] > 1:
        out = one_query_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    elif is_plain and attention_mask is not None and query.shape[1] > key.shape[1]:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return out.transpose(1, 2).contiguous(), None


_UNUSUAL = {"position_bias", "cache", "softcap"}  # arguments that only the ordinary function knows how to take

AttentionInterface.register(_NAME, attention)


def one_query_attention(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return attention of one query a head; several query heads may share one key head.

    (B, H, 1, d), (B, K, N, d), (B, K, N, e), mask (B or 1, 1, 1, N) → (B, H, 1, e), where K divides H.
    """
    n_rows, n_heads, _, width = query.shape
    grouped = query.view(n_rows, key.shape[1], -1, width)  # (B, K, H / K, d)
    scores = (grouped @ key.transpose(-1, -2)) * (width**-0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return (scores.softmax(dim=-1).to(value.dtype) @ value).view(n_rows, n_heads, 1, -1)
