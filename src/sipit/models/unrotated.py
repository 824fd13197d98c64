"""Cached keys with their rotary embedding taken off, so that one regression serves all positions.

Only proposals use it: a family whose convention this does not know is read worse, never wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sipit.observations import Cut

if TYPE_CHECKING:
    from sipit.models.language_model import LanguageModel

_ALIKE = 1e-3  # over the norm: a token's unrotated keys at the first layer, which has no context, at all positions


def unrotated_keys(lm: LanguageModel, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
    """Return keys as they were before rotary embedding; as they are where it is not known. (N, W), (N,) → (N, W)."""
    convention = lm.derived("rotary convention", lambda: _convention(lm))
    if convention is None:
        return keys
    return _turned_back(lm, layer, keys, positions, is_interleaved=convention == "interleaved")


def _convention(lm: LanguageModel) -> str | None:
    """Return how the pairs of coordinates lie that are rotated together, by what undoes it at layer 0."""
    token = torch.full((8,), lm.vocab_size // 3, dtype=torch.long)
    keys = lm.cut(Cut(0, "keys")).ordinary(token)  # (T, W)
    for name in ("halves", "interleaved"):
        try:
            back = _turned_back(lm, 0, keys, torch.arange(len(token)), is_interleaved=name == "interleaved")
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):
            return None
        if float((back - back[0]).norm(dim=1).max()) <= _ALIKE * float(keys[0].norm()):
            return name
    return None


def _turned_back(lm: LanguageModel, layer: int, keys: Tensor, positions: Tensor, *, is_interleaved: bool) -> Tensor:
    trunk: Any = lm.trunk
    config = trunk.config
    kinds = getattr(config, "layer_types", None) or {}
    row = keys.new_zeros(1, 1, dtype=torch.float32)
    places = positions.to(keys.device)[None]
    try:
        cos, sin = trunk.rotary_emb(row, places)  # (1, N, R) each
    except TypeError:
        cos, sin = trunk.rotary_emb(row, places, kinds[layer])
    rotated = cos.shape[-1]  # coordinates of a head that are rotated: the first ones
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = keys.float().view(len(keys), -1, width)  # (N, H, d_head)
    turned, rest = heads[..., :rotated], heads[..., rotated:]
    cos, sin = cast(Tensor, cos)[0][:, None], cast(Tensor, sin)[0][:, None]  # (N, 1, R)
    scale = cos.square() + sin.square()
    if is_interleaved:
        pairs = turned.unflatten(-1, (-1, 2))
        swapped = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
    back = (turned * cos - swapped * sin) / scale
    return torch.cat([back, rest], dim=-1).flatten(1)
