"""What each family's forward pass takes as its mask, so that every token of a packed row sees its own prefix alone.

Shapes: Q packed tokens, P kept ones before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.models.families import Family


class RowMasks:
    """Makes the masks of packed passes.

    Args:
        family: how its layout takes a mask.
        config: of the model; says which windows and chunks its blocks attend in.
        attentions: those of a family that holds causal masks in buffers, to be opened for each pass.
    """

    def __init__(self, family: Family, config: Any, attentions: Sequence[Any] = ()) -> None:
        self._family = family
        self._config = config
        self._attentions = attentions

    def masks(
        self, visible: Tensor, positions: Tensor, places: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """Return what the forward pass takes as attention_mask: additive, (1, 1, Q, P + Q).

        Args:
            visible: (Q, P + Q) bool, the tokens that each packed token continues, and itself.
            positions: (Q,) of the packed tokens in their prompts.
            places: (P + Q,) of all tokens in their prompts.
            dtype: of the model's arithmetic.

        Raises:
            OptionError: the row is so long that Llama-4 scales queries, by their place in it and not in their prompt.
        """
        family, config = self._family, self._config
        if getattr(config, "attn_temperature_tuning", False) and len(places) >= config.floor_scale:
            raise OptionError(
                f"a packed pass over {len(places)} tokens is longer than the {config.floor_scale - 1} up to which "
                f"{config.model_type!r} scales no query; invert a shorter prompt, or pass a smaller max_batch"
            )
        if family.masking == "buffer":
            self._fill_buffers(visible, positions, places)
            return _additive(visible, dtype)
        window = _window_of(config)
        kinds = set(config.layer_types or ()) if family.masking == "by_layer_type" else set()
        if kinds & {"sliding_attention", "chunked_attention"}:
            masks = {"full_attention": _additive(visible, dtype)}
            if "sliding_attention" in kinds:
                seen = visible if window is None else _windowed(visible, positions, places, window)
                masks["sliding_attention"] = _additive(seen, dtype)
            if "chunked_attention" in kinds:
                masks["chunked_attention"] = _additive(
                    _chunked(visible, positions, places, config.attention_chunk_size), dtype
                )
            return masks
        if family.masking == "one_mask" and window is not None:
            visible = _windowed(visible, positions, places, window)
        return _additive(visible, dtype)

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


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]  # (1, 1, Q, P + Q)


def _window_of(config: Any) -> int | None:
    """Return the length of the window that blocks attend in; None where every block attends to all of its prefix."""
    is_off = getattr(config, "use_sliding_window", None) is False
    kinds: Any = getattr(config, "layer_types", None)
    if is_off or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None) or None


def _windowed(visible: Tensor, positions: Tensor, places: Tensor, window: int) -> Tensor:
    """Hide keys `window` or more positions back. (Q, P + Q), (Q,), (P + Q,) → (Q, P + Q)."""
    return visible & (positions[:, None] - places[None, :] < window)


def _chunked(visible: Tensor, positions: Tensor, places: Tensor, chunk: int) -> Tensor:
    """Hide keys of earlier chunks of positions. (Q, P + Q), (Q,), (P + Q,) → (Q, P + Q)."""
    return visible & (positions[:, None] // chunk == places[None, :] // chunk)
