"""Blocks of vectors seen as one matrix: checked once, fetched by row number, never copied whole.

Knows nothing of language models. N rows in all, D = width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sipit.errors import NonFiniteError, ShapeError

_SLICE_VALUES = 1 << 23  # numbers read at a time


class Rows:
    """Read access to the rows of several blocks under global numbers.

    Args:
        blocks: each (n_rows, D), one floating dtype and device; may be memory-mapped.

    Raises:
        ShapeError: a block is not two-dimensional or its width or dtype differs.
        NonFiniteError: a row holds NaN or infinity.
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = [block.detach() for block in blocks]
        if not self._blocks:
            raise ShapeError("there is no block of rows to search; pass at least one of shape (n_rows, d_model)")
        first = self._blocks[0]
        for number, block in enumerate(self._blocks):
            _check_block(number, block, first)
        self.width = first.shape[1]
        self.device = first.device
        sizes = torch.tensor([len(block) for block in self._blocks])
        self._starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])  # (n_blocks + 1,)
        largest = 0.0
        for start, rows in self.slices():
            finite = torch.isfinite(rows).all(dim=1)
            if not bool(finite.all()):
                raise NonFiniteError(
                    f"row {start + int((~finite).nonzero()[0, 0])} holds NaN or infinity, so it has no distance to "
                    "others; leave it out, or capture in a wider dtype"
                )
            largest = max(largest, float(rows.abs().max())) if rows.numel() else largest
        self._scale = 2.0 ** -math.frexp(largest)[1]  # no value above 1: squares do not overflow

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def n_pairs(self) -> int:
        """Number of pairs of different rows."""
        return len(self) * (len(self) - 1) // 2

    def slices(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first row, rows as stored) over a range, a bounded slice at a time."""
        stop = len(self) if stop is None else stop
        size = max(1, _SLICE_VALUES // max(self.width, 1))
        for block, first in zip(self._blocks, self._starts.tolist(), strict=False):
            low, high = max(start, first), min(stop, first + len(block))
            for at in range(low, high, size):
                yield at, block[at - first : min(at + size, high) - first]

    def take(self, numbers: Tensor) -> Tensor:
        """Return rows by number, in float64, which holds every stored value exactly. (N,) → (N, D)."""
        numbers = numbers.cpu()
        place = torch.searchsorted(self._starts, numbers, right=True) - 1  # (N,)
        device = torch.device("cpu") if self.device.type == "mps" else self.device  # which lacks float64
        found = torch.empty(len(numbers), self.width, dtype=torch.float64, device=device)
        for i in place.unique().tolist():
            here = place == i
            chosen = (numbers[here] - self._starts[i]).to(self.device)
            found[here.to(device)] = self._blocks[i].index_select(0, chosen).to(device).double()
        return found

    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the L2 distances of pairs of rows by float64 differences. (N,), (N,) → (N,) on the CPU."""
        apart = (self.take(first) - self.take(second)) * self._scale  # exact: a power of two
        lengths: Tensor = torch.linalg.vector_norm(apart, dim=1) / self._scale
        return lengths.cpu()


def _check_block(number: int, block: Tensor, first: Tensor) -> None:
    if block.ndim != 2:
        raise ShapeError(
            f"block {number} has shape {tuple(block.shape)}; pass blocks of shape (n_rows, d_model), a row a state"
        )
    if not block.is_floating_point():
        raise ShapeError(f"block {number} holds {block.dtype}, not floating-point numbers; convert it")
    if (block.shape[1], block.dtype, block.device) != (first.shape[1], first.dtype, first.device):
        raise ShapeError(
            f"block {number} is {block.shape[1]} wide in {block.dtype} on {block.device}, block 0 is {first.shape[1]} "
            f"wide in {first.dtype} on {first.device}; search rows of one width, dtype and device at a time"
        )
