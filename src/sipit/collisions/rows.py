"""Blocks of vectors seen as one matrix: checked once, fetched by row number, never copied whole.

Knows nothing of language models. N rows in all, D = width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sipit.errors import NonFiniteError, ShapeError
from sipit.float64 import float64_device

Block = Tensor | np.ndarray[Any, np.dtype[Any]] | Sequence[Sequence[float]]

_SLICE_VALUES = 1 << 23  # numbers read at a time


class Rows:
    """Read access to the rows of several blocks under global numbers.

    Args:
        blocks: each (n_rows, D), one floating dtype and device; may be memory-mapped. Numpy arrays are taken as
            they are, lists of lists of numbers as float64.

    Raises:
        ShapeError: a block is no array, is not two-dimensional, or its width or dtype differs.
        NonFiniteError: a row holds NaN or infinity.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = [_tensor_of(number, block) for number, block in enumerate(blocks_in(blocks))]
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
        self.exponent = math.frexp(largest)[1]  # of two: no value is larger

    def __len__(self) -> int:
        return int(self._starts[-1])

    def before(self, block: int) -> int:
        """Return how many rows lie before a block."""
        return int(self._starts[block])

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
        device = float64_device(self.device)
        found = torch.empty(len(numbers), self.width, dtype=torch.float64, device=device)
        for i in place.unique().tolist():
            here = place == i
            chosen = (numbers[here] - self._starts[i]).to(self.device)
            found[here.to(device)] = self._blocks[i].index_select(0, chosen).to(device).double()
        return found

    def unit(self, values: Tensor) -> Tensor:
        """Return float64 values of rows in units of two to the `exponent`: none is above 1.

        Exact but for values below 2^-1022 of the largest.
        """
        half = self.exponent // 2  # one factor for all of it may overflow
        return values * 2.0**-half * 2.0 ** (half - self.exponent)

    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the L2 distances of pairs of rows by float64 differences. (N,), (N,) → (N,) on the CPU.

        A distance that float64 cannot hold is infinity.
        """
        apart = self.take(first) - self.take(second)
        if not apart.shape[1]:
            return torch.zeros(len(apart), dtype=torch.float64)
        exponent = torch.frexp(apart.abs().amax(dim=1)).exponent.long()  # (N,): each pair has its own unit
        half = exponent // 2
        up, rest = _power_of_two(-half), _power_of_two(half - exponent)
        lengths = torch.linalg.vector_norm(apart * up[:, None] * rest[:, None], dim=1)
        distances: Tensor = lengths / rest / up
        return distances.cpu()


def blocks_in(blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks one by one.

    Raises:
        ShapeError: there are none, since this is a number or nothing at all.
    """
    if isinstance(blocks, str | bytes) or not isinstance(blocks, Iterable):
        raise ShapeError(
            f"blocks of rows are given as {type(blocks).__name__}; pass a list of tensors of shape (n_rows, d_model)"
        )
    try:
        return list(blocks)
    except TypeError as error:  # an array without dimensions
        raise ShapeError(f"blocks of rows cannot be told apart ({error}); pass a list of tensors") from error


def _tensor_of(number: int, block: Block) -> Tensor:
    """Return a block as a tensor, without a copy where it is an array already."""
    if isinstance(block, Tensor):
        return block.detach()
    if not isinstance(block, np.ndarray | list | tuple):
        raise ShapeError(
            f"block {number} is a {type(block).__name__}; pass a tensor, a numpy array or a list of rows of numbers"
        )
    try:
        if isinstance(block, np.ndarray):
            native = block.astype(block.dtype.newbyteorder("="), copy=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a read-only array: nothing is written here
                return torch.from_numpy(native.copy() if min(native.strides, default=0) < 0 else native)
        return torch.tensor(block, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ShapeError(
            f"block {number} does not hold rows of numbers, all of one width ({error}); pass an array of shape "
            "(n_rows, d_model)"
        ) from error


def _power_of_two(exponents: Tensor) -> Tensor:
    """Return 2 to whole numbers between -1022 and 1023, exactly, in float64."""
    return ((exponents + 1023) << 52).view(torch.float64)


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
