"""Keys and values of a pass: those of kept prefixes, those asked for afterwards, and where a pass ends at them.

Knows neither tokens nor positions: `packed_row` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 512  # columns added at a time, at least


class ReachedCache(Exception):  # noqa: N818  not an error: the pass is where it was to end
    """Ends a pass inside a block, with the keys and values that the block caches. (B, T, n_heads × d_head) each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = _by_position(keys)
        self.values = _by_position(values)


class PrefixCache(Cache):
    """Keys and values that are kept, with room behind them for the tokens of a packed pass.

    A packed pass writes its keys behind what is kept without copying it; `keep` then moves the
    accepted ones there, so that no token is computed twice.

    Args:
        n_layers: blocks whose keys and values are kept.
        is_cut: whether the pass ends in the block behind them, with the keys and values it caches.
    """

    def __init__(self, n_layers: int, *, is_cut: bool = False) -> None:
        self._buffers: list[_PrefixLayer] = [_PrefixLayer() for _ in range(n_layers)]
        if is_cut:
            self._buffers.append(_LastPrefixLayer())
        super().__init__(layers=[*self._buffers])

    def keep(self, columns: Sequence[int]) -> None:
        """Append columns of the last packed pass to what is kept, in this order."""
        for layer in self._buffers:
            layer.keep(columns)

    def select(self, columns: Tensor) -> None:
        """Keep some of the kept columns, in their order, and forget the others. (N,)."""
        for layer in self._buffers:
            layer.select(columns)


class _PrefixLayer(DynamicLayer):
    """One block's keys and values in buffers that grow by doubling, (1, n_heads, room, d_head) each."""

    def __init__(self) -> None:
        DynamicLayer.__init__(self)
        self.length = 0
        self._k = torch.empty(0)
        self._v = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, stop = self.length, self.length + key_states.shape[-2]
        if not self.is_initialized:
            self._k = key_states.new_empty(*key_states.shape[:-2], 0, key_states.shape[-1])
            self._v = value_states.new_empty(*value_states.shape[:-2], 0, value_states.shape[-1])
            self.is_initialized = True
        if key_states.requires_grad:  # a gradient flows through these: leave the buffers alone
            return (
                torch.cat([self._k[..., :start, :], key_states], dim=-2),
                torch.cat([self._v[..., :start, :], value_states], dim=-2),
            )
        if stop > self._k.shape[-2]:
            self._k = _grown(self._k, start, stop)
            self._v = _grown(self._v, start, stop)
        self._k[..., start:stop, :] = key_states
        self._v[..., start:stop, :] = value_states
        return self._k[..., :stop, :], self._v[..., :stop, :]

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, columns: Sequence[int]) -> None:
        start, self.length = self.length, self.length + len(columns)
        if self.is_initialized and list(columns) != list(range(len(columns))):  # else already in place
            places = torch.tensor(columns, device=self._k.device) + start
            self._k[..., start : self.length, :] = self._k[..., places, :]
            self._v[..., start : self.length, :] = self._v[..., places, :]

    def select(self, columns: Tensor) -> None:
        self.length = len(columns)
        if self.is_initialized and not torch.equal(columns, torch.arange(len(columns))):  # else already in place
            places = columns.to(self._k.device)
            self._k[..., : self.length, :] = self._k[..., places, :]
            self._v[..., : self.length, :] = self._v[..., places, :]


class _LastPrefixLayer(_PrefixLayer):
    """Of a block that runs no further than to its keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise ReachedCache(key_states, value_states)


class EmptyCache(Cache):
    """Of an ordinary pass that ends at the keys and values of its last block: nothing came before or is kept."""

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[*[_EmptyLayer() for _ in range(n_layers)], _EmptyLastLayer()])


class RecordingCache(Cache):
    """Of an ordinary pass: nothing came before, and the keys and values of each block can be asked for afterwards."""

    def __init__(self, n_layers: int) -> None:
        self._recorded = [_RecordingLayer() for _ in range(n_layers)]
        super().__init__(layers=[*self._recorded])

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return what a block cached, (B, T, n_heads × d_head) each; None where it caches nothing of its own."""
        recorded = self._recorded[layer]
        if recorded.seen is None:
            return None
        keys, values = recorded.seen
        return _by_position(keys), _by_position(values)


class _EmptyLayer(DynamicLayer):
    def __init__(self) -> None:
        DynamicLayer.__init__(self)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _EmptyLastLayer(_EmptyLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise ReachedCache(key_states, value_states)


class _RecordingLayer(_EmptyLayer):
    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.seen = key_states, value_states
        return key_states, value_states


def _by_position(heads: Tensor) -> Tensor:
    """Lay the heads of each position side by side. (B, n_heads, T, d_head) → (B, T, n_heads × d_head)."""
    return heads.transpose(1, 2).flatten(2)


def _grown(buffer: Tensor, filled: int, needed: int) -> Tensor:
    room = max(needed, filled + _ROOM, 2 * buffer.shape[-2] if filled > _ROOM else 0)
    grown = buffer.new_empty(*buffer.shape[:-2], room, buffer.shape[-1])
    grown[..., :filled, :] = buffer[..., :filled, :]
    return grown
