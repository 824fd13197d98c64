"""The logits that a causal LM makes of states after its final norm, by its own forward pass.

Families scale, cap and slice them in their own ways, so the whole model runs, and in place of its
trunk stands a module that hands on the given states.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from sipit.models.families import module_at
from sipit.models.prepacked import prepacked
from sipit.models.shallow import with_part


class LogitsHead(nn.Module):
    """From states after the final norm to logits.

    Args:
        model: a causal LM; not modified.
        trunk: dotted path to the module that owns its blocks.
    """

    def __init__(self, model: nn.Module, trunk: str) -> None:
        super().__init__()
        self._given = _Given(module_at(model, trunk))
        self._whole = (prepacked(with_part(model, trunk, self._given)),)  # in a tuple: its weights are the model's

    def forward(self, states: Tensor) -> Tensor:
        """(B, T, D) → (B, T, W)."""
        with self._given.holding(states):
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            return cast(Tensor, cast(Any, self._whole[0])(input_ids=ids, use_cache=False).logits)


class _TrunkOutput(BaseModelOutputWithPast):
    """What a trunk returns, whatever else its family's heads ask of it: they find None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """In place of a trunk: hands on the given states, whatever comes in."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.config = cast(Any, trunk).config
        self._embeddings = (cast(Any, trunk).get_input_embeddings(),)
        self._held = threading.local()  # two threads may ask at once

    @contextmanager
    def holding(self, states: Tensor) -> Iterator[None]:
        """Hand these states on while the block runs."""
        self._held.states = states
        try:
            yield
        finally:
            del self._held.states

    def get_input_embeddings(self) -> Any:
        return self._embeddings[0]

    def forward(self, *_: Any, **__: Any) -> _TrunkOutput:
        return _TrunkOutput(last_hidden_state=self._held.states)
