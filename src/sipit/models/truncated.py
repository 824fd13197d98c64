"""A causal LM cut after its first blocks: ordinary passes, and packed ones that check many candidates in one row.

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

from sipit.models.arithmetic import rounding_of
from sipit.models.attention import lean_attention
from sipit.models.families import Family
from sipit.models.generation import GenerationCache
from sipit.models.packed_row import PackedRow, Placed
from sipit.models.prefix_cache import EmptyCache, ReachedCache, RecordingCache
from sipit.models.prepacked import prepacked
from sipit.models.row_masks import RowMasks
from sipit.models.shallow import clone
from sipit.models.sites import SiteSpec


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
        self.rounding = rounding_of(trunk)  # largest relative error of one rounding in its products
        self._family = family
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
        self._masks = RowMasks(family, cast(Any, trunk).config, self._attentions)
        self._fast = prepacked(lean_attention(self._packed))

    @property
    def device(self) -> torch.device:
        """Where the blocks live."""
        return next(self._plain.parameters()).device

    def row(self, prefix: Tensor | None = None) -> PackedRow:
        """Return a row of packed passes behind a prefix, by default an empty one. (P,)."""
        row = PackedRow(self)
        if prefix is not None and len(prefix):
            row.extend(prefix)
        return row

    def ordinary(self, input_ids: Tensor) -> Tensor:
        """Return the values of one prompt by one ordinary forward pass. (T,) → (T, W)."""
        return self.ordinary_batch(input_ids[None])[0]

    @torch.no_grad()
    def ordinary_batch(self, input_ids: Tensor) -> Tensor:
        """Return the values of prompts of one length by one ordinary forward pass. (B, T) → (B, T, W)."""
        ids = input_ids.to(self.device)
        if self.spec.ends == "cache":
            cache = EmptyCache(self.layer)
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
        except ReachedCache as reached:
            return self.spec.read(reached.keys, reached.values)
        return self.spec.read(states if self._head is None else self._head(states))

    @torch.no_grad()
    def run_packed(self, token_ids: Tensor, placed: Placed) -> Tensor:
        """Return the values of Q tokens in one row; `PackedRow.run` is what calls this. (Q,) → (Q, W)."""
        return self._packed_pass(self._fast, placed, input_ids=token_ids.to(self.device)[None])

    @torch.no_grad()
    def run_packed_at(self, token_ids: Tensor, placed: Placed, cuts: Sequence[tuple[int, bool]]) -> list[Tensor]:
        """As `run_packed`, at several (layer, is_final) cuts. (Q, D) each."""
        taps = [_Tap(block) for block in cast(nn.ModuleList, getattr(self._fast, self._family.blocks))]
        tapped = clone(self._fast, {self._family.blocks: nn.ModuleList(taps)})
        last = self._packed_pass(tapped, placed, input_ids=token_ids.to(self.device)[None])
        return [states.reshape(len(token_ids), -1) for states in _at_cuts(taps, last, cuts, self.spec.is_behind_all)]

    def run_packed_embeddings(self, embeddings: Tensor, placed: Placed) -> Tensor:
        """As `run_packed`, from embedding vectors (Q, D); differentiable."""
        return self._packed_pass(self._packed, placed, inputs_embeds=embeddings[None])

    def _packed_pass(self, model: nn.Module, placed: Placed, **tokens: Tensor) -> Tensor:
        positions, places = placed.positions.to(self.device), placed.places.to(self.device)
        visible, dtype = placed.visible.to(self.device), next(self._plain.parameters()).dtype
        with self._filling:
            return self._read(
                model,
                **tokens,
                position_ids=positions[None],
                attention_mask=self._masks.masks(visible, positions, places, dtype),
                past_key_values=placed.cache,
                use_cache=True,
            )[0]  # (Q, W)

    def _with_open_buffer(self, block: nn.Module) -> nn.Module:
        outer = cast(nn.Module, block.attn)
        inner = clone(cast(nn.Module, outer.attention), {})
        inner.__dict__["_buffers"] = dict(inner._buffers)
        self._attentions.append(inner)
        return clone(block, {"attn": clone(outer, {"attention": inner})})


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
