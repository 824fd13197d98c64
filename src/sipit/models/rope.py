"""Rotary embeddings that change with the length of the whole pass, so that states depend on what follows them."""

from __future__ import annotations

from typing import Any

_BY_LENGTH = ("dynamic", "longrope")  # rope types whose angles transformers makes anew for longer passes


def switch_length(config: Any) -> int | None:
    """Return the most tokens a pass may have before its states depend on how many there are.

    None where no length does. Up to it a state follows from its prefix alone; beyond it the angles at
    every position are other ones, of a short prefix too.
    """
    given = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in given.values() if isinstance(part, dict)]  # one a kind of attention layer
    lengths = []
    for rope in nested or [given]:
        if rope.get("rope_type") in _BY_LENGTH:
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            lengths.append(int(original or config.max_position_embeddings))
    return min(lengths, default=None)
