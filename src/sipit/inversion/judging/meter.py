"""Counts the work of a search in the unit that is the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Meter:
    """Counts the work of a search in the unit that is the same on every machine."""

    block_tokens: int = 0
    n_checked: int = 0
    n_passes: int = 0  # through the model, or some of its blocks

    def spend(self, n_tokens: int, n_blocks: int, *, passes: int = 1) -> None:
        """Add n_tokens through n_blocks; a backward pass counts as two passes more."""
        self.block_tokens += n_tokens * n_blocks * passes
        self.n_passes += passes

    def add(self, *, block_tokens: int, n_checked: int, n_passes: int) -> None:
        """Add the work of a whole search."""
        self.block_tokens += block_tokens
        self.n_checked += n_checked
        self.n_passes += n_passes
