"""A causal LM cut after its first blocks, and the packed pass that checks many candidates in one row.

Shapes: T tokens of a prompt, P of its prefix in the cache, Q packed tokens, D = d_model. Knows no
proposals, no observations and no tolerance: it turns tokens into states.

The cut is a shallow clone: it shares every weight with the caller's model and changes nothing there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from sipit.errors import OptionError
from sipit.models.attention import lean_attention
from sipit.models.families import Family
from sipit.models.generation import GenerationCache
from sipit.models.prepacked import prepacked
from sipit.models.shallow import clone
from sipit.models.sites import SiteSpec

_ROOM = 512  # cache columns added at a time, at least
_NO_LANE = -1  # of tokens that were dropped: no packed token is of it


class PrefixCache(Cache):
    """Keys and values of accepted prefixes, with room behind them for the tokens of a packed pass.

    A packed pass writes its keys behind what is kept without copying it; `keep` then moves the
    accepted ones there, so that no token is computed twice. Several prompts may share the row: each
    has a lane, and a token sees the prefix of its own lane alone.

    Args:
        n_layers: blocks whose keys and values are kept.
        is_cut: whether the pass ends in the block behind them, with the keys and values it caches.
    """

    def __init__(self, n_layers: int, *, is_cut: bool = False) -> None:
        self._buffers: list[_PrefixLayer] = [_PrefixLayer() for _ in range(n_layers)]
        if is_cut:
            self._buffers.append(_LastLayer())
        super().__init__(layers=[*self._buffers])
        self.lanes = torch.empty(0, dtype=torch.long)  # (P,) of each kept token
        self.positions = torch.empty(0, dtype=torch.long)  # (P,) in its own prompt
        self.packed_lanes = self.packed_positions = self.lanes  # (Q,) of the last packed pass

    @property
    def length(self) -> int:
        """Tokens kept, P, over all lanes."""
        return len(self.lanes)

    def keep(self, columns: Sequence[int]) -> None:
        """Append the given tokens of the last packed pass to the prefixes of their lanes, in this order."""
        for layer in self._buffers:
            layer.keep(columns)
        self.lanes = torch.cat([self.lanes, self.packed_lanes[list(columns)]])
        self.positions = torch.cat([self.positions, self.packed_positions[list(columns)]])

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens kept."""
        self.select(torch.arange(min(length, self.length)))

    def forget(self, lane: int, position: int) -> None:
        """Forget the tokens of one lane from a position on."""
        self.select((~((self.lanes == lane) & (self.positions >= position))).nonzero()[:, 0])

    def drop(self, lane: int) -> None:
        """Forget one lane. Its columns are given back once they and others dropped are half of all."""
        self.lanes = self.lanes.masked_fill(self.lanes == lane, _NO_LANE)
        alive = (self.lanes != _NO_LANE).nonzero()[:, 0]
        if 2 * len(alive) <= self.length:
            self.select(alive)

    def select(self, columns: Tensor) -> None:
        """Keep some of the kept tokens, in their order, and forget the others. (N,)."""
        for layer in self._buffers:
            layer.select(columns)
        self.lanes, self.positions = self.lanes[columns], self.positions[columns]


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
        """Keep some of the kept tokens, in their order. (N,)."""
        self.length = len(columns)
        if self.is_initialized and not torch.equal(columns, torch.arange(len(columns))):  # else already in place
            places = columns.to(self._k.device)
            self._k[..., : self.length, :] = self._k[..., places, :]
            self._v[..., : self.length, :] = self._v[..., places, :]


class _Reached(Exception):  # noqa: N818  not an error: the pass is where it was to end
    """Ends a pass inside a block, with the keys and values that the block caches. (B, n_heads, T, d_head) each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values


class _LastLayer(_PrefixLayer):
    """Of a block that runs no further than to its keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise _Reached(key_states, value_states)


class _EmptyLayer(DynamicLayer):
    """Of a block in an ordinary pass: nothing came before, and nothing is kept."""

    def __init__(self) -> None:
        DynamicLayer.__init__(self)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _EmptyLastLayer(_EmptyLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise _Reached(key_states, value_states)


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


def _window_of(config: Any) -> int | None:
    """Return the length of the window that blocks attend in; None where every block attends to all of its prefix."""
    is_off = getattr(config, "use_sliding_window", None) is False
    kinds: Any = getattr(config, "layer_types", None)
    if is_off or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None) or None


def _grown(buffer: Tensor, filled: int, needed: int) -> Tensor:
    room = max(needed, filled + _ROOM, 2 * buffer.shape[-2] if filled > _ROOM else 0)
    grown = buffer.new_empty(*buffer.shape[:-2], room, buffer.shape[-1])
    grown[..., :filled, :] = buffer[..., :filled, :]
    return grown


class TruncatedModel:
    """The first blocks of a causal LM, up to a site: from tokens to the values that leak there.

    Args:
        trunk: the module that owns the blocks; not modified.
        family: its attribute names.
        layer: number of blocks run.
        spec: the site. W is the width of its values, D that of the states where the pass ends.
        head: from states after the final norm to logits, for a site behind it.
    """

    def __init__(
        self, trunk: nn.Module, family: Family, *, layer: int, spec: SiteSpec, head: nn.Module | None = None
    ) -> None:
        self.layer = layer
        self.spec = spec
        self._family = family
        self._config: Any = trunk.config
        self._head = head
        n_blocks = layer + 1 if spec.ends == "cache" else layer
        blocks = list(cast(nn.ModuleList, getattr(trunk, family.blocks)))[:n_blocks]
        children: dict[str, nn.Module] = {family.blocks: nn.ModuleList(blocks)}
        if not spec.is_behind_all:
            children |= {name: nn.Identity() for name in family.final if getattr(trunk, name) is not None}
        self._plain = clone(trunk, children)
        self._attentions: list[Any] = []  # of the packed clone, where its masks sit in buffers
        self._packed = self._plain
        self._filling = threading.RLock() if family.masking == "buffer" else nullcontext()  # the buffers are one pass's
        if family.masking == "buffer":
            blocks = [self._with_open_buffer(block) for block in blocks]
            self._packed = clone(trunk, {**children, family.blocks: nn.ModuleList(blocks)})
        self._fast = prepacked(lean_attention(self._packed))

    @property
    def device(self) -> torch.device:
        """Where the blocks live."""
        return next(self._plain.parameters()).device

    def new_cache(self) -> PrefixCache:
        """Return an empty prefix cache for `packed`."""
        return PrefixCache(self.layer, is_cut=self.spec.ends == "cache")

    def cache_of(self, prefix: Tensor) -> PrefixCache:
        """Return the cache of a prefix, for `packed`. (P,)."""
        cache = self.new_cache()
        if len(prefix):
            sees = torch.ones(len(prefix), len(prefix), dtype=torch.bool).tril()
            self.packed(cache, prefix, torch.arange(len(prefix)), sees)
            cache.keep(range(len(prefix)))
        return cache

    def ordinary(self, input_ids: Tensor) -> Tensor:
        """Return the values of one prompt by one ordinary forward pass. (T,) → (T, W)."""
        return self.ordinary_batch(input_ids[None])[0]

    @torch.no_grad()
    def ordinary_batch(self, input_ids: Tensor) -> Tensor:
        """Return the values of prompts of one length by one ordinary forward pass. (B, T) → (B, T, W)."""
        ids = input_ids.to(self.device)
        if self.spec.ends == "cache":
            cache = Cache(layers=[*[_EmptyLayer() for _ in range(self.layer)], _EmptyLastLayer()])
            return self._read(self._plain, input_ids=ids, past_key_values=cache, use_cache=True)
        return self._read(self._plain, input_ids=ids, use_cache=False)

    def from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return the values of one prompt given as embedding vectors, by an ordinary pass; differentiable.

        (T, D) → (T, W)
        """
        return self._read(self._plain, inputs_embeds=embeddings[None], use_cache=False)[0]

    def _read(self, model: nn.Module, **arguments: Any) -> Tensor:
        """Run a pass to where it ends, and read what leaks there. (B, T, W)."""
        try:
            states = cast(Tensor, model(**arguments)[0])  # (B, T, D)
        except _Reached as reached:
            return self.spec.read(_by_position(reached.keys), _by_position(reached.values))
        return self.spec.read(states if self._head is None else self._head(states))

    @torch.no_grad()
    def packed(
        self,
        cache: PrefixCache,
        token_ids: Tensor,
        positions: Tensor,
        sees: Tensor | None = None,
        lanes: Tensor | None = None,
        attends: Tensor | None = None,
    ) -> Tensor:
        """Return the values of Q tokens that continue cached prefixes, in one row.

        Args:
            cache: of the prefixes, P tokens; its room behind them is overwritten.
            token_ids: (Q,)
            positions: (Q,) position of each token in its own prompt: the length of its prefix, or more.
            sees: (Q, Q) bool, whether token i attends to packed token j; None: to itself alone.
            lanes: (Q,) whose prefix each token continues, 0 or more; None: lane 0.
            attends: (Q, P) bool, the kept tokens that each token continues, where lanes do not tell: prefixes
                that share tokens.

        Returns:
            (Q, W)
        """
        tokens = token_ids.to(self.device)[None]
        return self._packed_row(self._fast, cache, positions, sees, lanes, attends, input_ids=tokens)

    @torch.no_grad()
    def packed_at(
        self, cache: PrefixCache, token_ids: Tensor, positions: Tensor, cuts: Sequence[tuple[int, bool]]
    ) -> list[Tensor]:
        """As `packed`, each token alone behind the prefix, at several (layer, is_final) cuts. (Q, D) each.

        The model itself is cut at a plain site.
        """
        taps = [_Tap(block) for block in cast(nn.ModuleList, getattr(self._fast, self._family.blocks))]
        tapped = clone(self._fast, {self._family.blocks: nn.ModuleList(taps)})
        last = self._packed_row(tapped, cache, positions, None, None, None, input_ids=token_ids.to(self.device)[None])
        return [states.reshape(len(token_ids), -1) for states in _at_cuts(taps, last, cuts, self.spec.is_behind_all)]

    def packed_embeddings(
        self, cache: PrefixCache, embeddings: Tensor, positions: Tensor, lanes: Tensor | None = None
    ) -> Tensor:
        """As `packed`, from embedding vectors (Q, D), each alone behind its prefix; differentiable."""
        return self._packed_row(self._packed, cache, positions, None, lanes, None, inputs_embeds=embeddings[None])

    def _packed_row(
        self,
        model: nn.Module,
        cache: PrefixCache,
        positions: Tensor,
        sees: Tensor | None,
        lanes: Tensor | None,
        attends: Tensor | None,
        **tokens: Tensor,
    ) -> Tensor:
        n_packed = positions.shape[0]
        cache.packed_positions = positions.cpu()
        cache.packed_lanes = lanes = torch.zeros(n_packed, dtype=torch.long) if lanes is None else lanes.cpu()
        if sees is None:
            sees = torch.eye(n_packed, dtype=torch.bool)
        self._check_scale(n_packed + cache.length)
        kept = lanes[:, None] == cache.lanes if attends is None else attends.cpu()  # (Q, P)
        visible = torch.cat([kept, sees.cpu()], dim=1).to(self.device)  # (Q, P + Q)
        positions = positions.to(self.device)
        places = torch.cat([cache.positions.to(self.device), positions])  # (P + Q,)
        with self._filling:
            return self._read(
                model,
                **tokens,
                position_ids=positions[None],
                attention_mask=self._masks(visible, positions, places),
                past_key_values=cache,
                use_cache=True,
            )[0]  # (Q, W)

    def _check_scale(self, n_keys: int) -> None:
        """Refuse a row in which Llama-4 would scale queries by their place in the row, not in their prompt."""
        config = self._config
        if getattr(config, "attn_temperature_tuning", False) and n_keys >= config.floor_scale:
            raise OptionError(
                f"a packed pass over {n_keys} tokens is longer than the {config.floor_scale - 1} up to which "
                f"{config.model_type!r} scales no query; invert a shorter prompt, or pass a smaller max_batch"
            )

    def _masks(self, visible: Tensor, positions: Tensor, places: Tensor) -> Tensor | dict[str, Tensor]:
        """Return what this family's forward pass takes as attention_mask: additive, (1, 1, Q, P + Q)."""
        family, config = self._family, self._config
        if family.masking == "buffer":
            self._fill_buffers(visible, positions, places)
            return self._additive(visible)
        window = _window_of(config)
        kinds = set(config.layer_types or ()) if family.masking == "by_layer_type" else set()
        if kinds & {"sliding_attention", "chunked_attention"}:
            masks = {"full_attention": self._additive(visible)}
            if "sliding_attention" in kinds:
                seen = visible if window is None else _windowed(visible, positions, places, window)
                masks["sliding_attention"] = self._additive(seen)
            if "chunked_attention" in kinds:
                masks["chunked_attention"] = self._additive(
                    _chunked(visible, positions, places, config.attention_chunk_size)
                )
            return masks
        if family.masking == "one_mask" and window is not None:
            visible = _windowed(visible, positions, places, window)
        return self._additive(visible)

    def _additive(self, visible: Tensor) -> Tensor:
        dtype = next(self._plain.parameters()).dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]  # (1, 1, Q, P + Q)

    def _with_open_buffer(self, block: nn.Module) -> nn.Module:
        outer = cast(nn.Module, block.attn)
        inner = clone(cast(nn.Module, outer.attention), {})
        inner.__dict__["_buffers"] = dict(inner._buffers)
        self._attentions.append(inner)
        return clone(block, {"attn": clone(outer, {"attention": inner})})

    def _fill_buffers(self, visible: Tensor, positions: Tensor, places: Tensor) -> None:
        """Open the causal buffers: the additive mask tells packed tokens apart, the window stays."""
        n_keys = visible.shape[1]
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=visible.device)
        everything = everything.expand(1, 1, n_keys, n_keys)
        windowed = everything
        if any(a.attention_type == "local" for a in self._attentions):
            rows = _windowed(visible, positions, places, self._config.window_size)  # (Q, P + Q)
            windowed = torch.cat([visible.new_ones(n_keys - len(rows), n_keys), rows])[None, None]
        for attention in self._attentions:
            attention._buffers["bias"] = windowed if attention.attention_type == "local" else everything


class UpperModel:
    """The blocks above `layer`, run on observed states: the model's own view of what comes next.

    Only proposals use it; nothing is accepted on its word.
    """

    def __init__(self, trunk: nn.Module, family: Family, *, layer: int, returns_tuple: bool) -> None:
        blocks = list(cast(nn.ModuleList, getattr(trunk, family.blocks)))
        self._entry = _Inject(returns_tuple)
        skipped = [_Skip(returns_tuple) for _ in blocks[: layer - 1]]
        children = {family.blocks: nn.ModuleList([*skipped, self._entry, *blocks[layer:]])}
        self._trunk = prepacked(clone(trunk, children))
        self.n_blocks = len(blocks) - layer

    @torch.no_grad()
    def final_states(self, states: Tensor) -> Tensor:
        """Return the states after the final norm that follow from states after `layer` blocks. (T, D) → (T, D)."""
        parameter = next(self._trunk.parameters())
        self._entry.held.states = states.to(parameter.device, parameter.dtype)[None]
        try:
            places = torch.zeros(1, states.shape[0], dtype=torch.long, device=parameter.device)
            return cast(Tensor, self._trunk(input_ids=places, use_cache=False)[0])[0]  # (T, D)
        finally:
            del self._entry.held.states


class TappedModel:
    """The first blocks of a causal LM, giving the states at several cuts in one pass over a batch.

    Args:
        trunk: the module that owns the blocks; not modified.
        family: its attribute names.
        cuts: (layer, is_final) of each tap.
    """

    def __init__(self, trunk: nn.Module, family: Family, cuts: Sequence[tuple[int, bool]]) -> None:
        self.cuts = tuple(cuts)
        self.layer = max(layer for layer, _ in cuts)
        self._is_final = any(is_final for _, is_final in cuts)
        blocks = list(cast(nn.ModuleList, getattr(trunk, family.blocks)))[: self.layer]
        self._taps = [_Tap(prepacked(lean_attention(block))) for block in blocks]
        children: dict[str, nn.Module] = {family.blocks: nn.ModuleList(self._taps)}
        if not self._is_final:
            children |= {name: nn.Identity() for name in family.final if getattr(trunk, name) is not None}
        self._trunk = clone(trunk, children)

    @property
    def returns_tuple(self) -> bool:
        """Whether the blocks, once run, returned their states in a tuple."""
        return any(tap.returns_tuple for tap in self._taps)

    @torch.no_grad()
    def states(self, input_ids: Tensor, cache: GenerationCache | RecordingCache | None = None) -> list[Tensor]:
        """Return the states at each cut, in their order. (B, L) → one (B, L, D) a cut.

        With a cache the tokens continue those it holds, and are held in it afterwards.
        """
        ids = input_ids.to(next(self._trunk.parameters()).device)
        if cache is None:
            last = self._trunk(input_ids=ids, use_cache=False)[0]
        else:
            last = self._trunk(input_ids=ids, past_key_values=cache, use_cache=True)[0]
        found = _at_cuts(self._taps, last, self.cuts, self._is_final)
        for tap in self._taps:
            tap.entered = tap.left = None
        return found


class _Tap(nn.Module):
    """A block that remembers what entered and left it; everything else is the block's own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.entered: Tensor | None = None
        self.left: Tensor | None = None
        self.returns_tuple = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.entered = hidden_states
        output = self.block(hidden_states, *args, **kwargs)
        self.returns_tuple = isinstance(output, tuple)
        self.left = output[0] if self.returns_tuple else output
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def _at_cuts(taps: Sequence[_Tap], last: Tensor, cuts: Sequence[tuple[int, bool]], ends_final: bool) -> list[Tensor]:
    """Return what the taps of one pass saw at each (layer, is_final); `last` is what came out at its end."""
    found: list[Tensor | None] = []
    for layer, is_final in cuts:
        if layer < len(taps):
            found.append(taps[layer].entered)
        else:
            found.append(last if is_final or not ends_final else taps[-1].left)
    return cast(list[Tensor], found)


class _Skip(nn.Module):
    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, None) if self._returns_tuple else hidden_states


class _Inject(_Skip):
    """In place of a block: hands on the given states whatever comes in."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__(returns_tuple)
        self.held = threading.local()  # two threads may ask at once

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return super().forward(getattr(self.held, "states", hidden_states))


def _windowed(visible: Tensor, positions: Tensor, places: Tensor, window: int) -> Tensor:
    """Hide keys `window` or more positions back. (Q, P + Q), (Q,), (P + Q,) → (Q, P + Q)."""
    return visible & (positions[:, None] - places[None, :] < window)


def _chunked(visible: Tensor, positions: Tensor, places: Tensor, chunk: int) -> Tensor:
    """Hide keys of earlier chunks of positions. (Q, P + Q), (Q,), (P + Q,) → (Q, P + Q)."""
    return visible & (positions[:, None] // chunk == places[None, :] // chunk)
