"""Writing on with a model, many rows at a time: a cache that is never copied.

That of transformers copies all keys and values at every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GenerationCache(Cache):
    """Keys and values of up to `length` tokens a row, in the dtype that attention computes in.

    A layer whose window is shorter keeps them all too; its mask hides what is out of sight.
    """

    def __init__(self, n_layers: int, length: int) -> None:
        super().__init__(layers=[_RoomyLayer(length) for _ in range(n_layers)])


class _RoomyLayer(DynamicLayer):
    """One block's keys and values in buffers made once, (B, n_heads, length, d_head) each.

    The keys lie transposed: products with a part of them read rows of it and copy nothing.
    """

    def __init__(self, room: int) -> None:
        DynamicLayer.__init__(self)
        self._room = room
        self._length = 0
        self._k = self._v = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self._k = self._buffer(key_states, *key_states.shape[:-2], key_states.shape[-1], self._room)
            self._v = self._buffer(value_states, *value_states.shape[:-2], self._room, value_states.shape[-1])
            self.is_initialized = True
        start, self._length = self._length, self._length + key_states.shape[-2]
        self._k[..., start : self._length] = key_states.transpose(-1, -2)
        self._v[..., start : self._length, :] = value_states
        return self._k[..., : self._length].transpose(-1, -2), self._v[..., : self._length, :]

    def get_seq_length(self) -> int:
        return self._length

    def _buffer(self, like: Tensor, *shape: int) -> Tensor:
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        return like.new_empty(shape, dtype=dtype)
