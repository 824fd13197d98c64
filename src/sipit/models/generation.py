"""Writing on with a model, many rows at a time: a cache that is never copied, attention of one query by products.

The cache of transformers copies all keys and values at every token, and the CPU's fused attention in
bfloat16 prepares the keys anew for a single query: together two thirds of a sampled token's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, DynamicLayer


class GenerationCache(Cache):
    """Keys and values of up to `length` tokens a row, in the dtype that attention computes in.

    A layer whose window is shorter keeps them all too; its mask hides what is out of sight.
    """

    def __init__(self, n_layers: int, length: int) -> None:
        super().__init__(layers=[_RoomyLayer(length) for _ in range(n_layers)])


class _RoomyLayer(DynamicLayer):
    """One block's keys and values in buffers made once, (B, n_heads, length, d_head) each."""

    def __init__(self, room: int) -> None:
        DynamicLayer.__init__(self)
        self._room = room
        self._length = 0
        self._k = self._v = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self._k, self._v = self._buffer(key_states), self._buffer(value_states)
            self.is_initialized = True
        start, self._length = self._length, self._length + key_states.shape[-2]
        self._k[..., start : self._length, :] = key_states
        self._v[..., start : self._length, :] = value_states
        return self._k[..., : self._length, :], self._v[..., : self._length, :]

    def get_seq_length(self) -> int:
        return self._length

    def _buffer(self, like: Tensor) -> Tensor:
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        return like.new_empty(*like.shape[:-2], self._room, like.shape[-1], dtype=dtype)


class OneQueryAttention(TorchFunctionMode):
    """While it is entered, attention of a single query on the CPU is two plain products."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_plain = len(args) == 3 and not (kwargs.get("dropout_p") or kwargs.get("is_causal"))
        if func is F.scaled_dot_product_attention and is_plain and _is_one_query(*args[:2]):
            return one_query_attention(*args, attn_mask=kwargs.get("attn_mask"), scale=kwargs.get("scale"))
        return func(*args, **kwargs)


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


def _is_one_query(query: Tensor, key: Tensor) -> bool:
    return query.device.type == "cpu" and query.ndim == 4 and query.shape[2] == 1 and key.shape[2] > 1
