"""Rows laid out for pruning: centred, projected on their main directions, grouped in leaves of near ones.

Everything here bounds distances from below or above with the rounding of its own arithmetic counted
in; nothing here decides. N rows, D their width, P directions, L leaves of S rows.

Lengths are in units of the frame: (row - centre) times a power of two, so that no row is longer than 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.collisions.rows import Rows

_SAMPLE = 8192  # rows the frame is made from
_DIRECTIONS = 32
_LEAF = 256  # rows, at most
_FINEST = 900  # exponent of the scale, which float64 must hold
_TINY = 2.0**-60  # times the width: lengths below may square to nothing in float32
_ITERATIONS = 6  # of the subspace iteration
_UNIT = 2.0**-24  # of float32
_PRODUCT_UNITS = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}  # of a float32 matrix product


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where distances are bounded: a centre, a scale and P main directions of the rows."""

    centre: Tensor  # (D,) float64, in the unit that `Rows.unit` gives
    exponent: int  # of two: what a distance of rows is multiplied by
    finer: float  # a power of two: what a length in the unit of the rows is multiplied by
    basis: Tensor  # (D, P) float64, orthonormal
    origin_error: float  # of a centred row, from rounding a large common offset

    @property
    def scale(self) -> float:
        """Length in the frame of a distance of 1."""
        return self.length(1.0)

    def length(self, distance: float) -> float:
        """Return a distance of rows as a length in the frame, infinity where float64 cannot hold it."""
        try:
            return math.ldexp(distance, self.exponent)
        except OverflowError:
            return math.copysign(math.inf, distance)


def frame_of(rows: Rows) -> Frame:
    """Return the frame of some rows, from an even sample of them and one pass for the longest."""
    n_rows = len(rows)
    chosen = torch.arange(min(n_rows, _SAMPLE)) * max(n_rows, 1) // max(min(n_rows, _SAMPLE), 1)
    sample = rows.unit(rows.take(chosen))  # (n, D)
    centre = sample.median(dim=0).values if n_rows else sample.new_zeros(rows.width)
    longest = 0.0
    for _, part in rows.slices():
        longest = max(longest, float((rows.unit(part.to(centre)) - centre).abs().max()))
    longest *= rows.width**0.5  # bounds the norm of any row
    exponent = min(-math.frexp(longest)[1], _FINEST)
    finer = 2.0**exponent
    sample = (sample - centre) * finer
    generator = torch.Generator().manual_seed(0)
    n_directions = min(_DIRECTIONS, rows.width)
    basis = torch.randn(rows.width, n_directions, generator=generator, dtype=torch.float64).to(sample.device)
    basis = torch.linalg.qr(basis).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(sample.T @ (sample @ basis)).Q  # (D, P)
    error = 2.0**-50 * float((centre * finer).norm())
    return Frame(centre=centre, exponent=exponent - rows.exponent, finer=finer, basis=basis, origin_error=error)


def panel_bytes(width: int) -> int:
    """Return the memory that one row takes in a panel, at most, while it is made included."""
    return 4 * (3 * width + 4 * (_DIRECTIONS + 4)) + 32


class Panel:
    """Some rows in a frame, in leaves of equal size; the last few places may be empty (number -1)."""

    def __init__(self, rows: Rows, numbers: Tensor, frame: Frame) -> None:
        x, z, z_error = _placed(rows, numbers, frame)
        n_levels = max(0, -(-len(numbers) // _LEAF) - 1).bit_length()
        n_leaves = 1 << n_levels
        size = max(1, -(-len(numbers) // n_leaves))
        order = torch.arange(n_leaves * size, device=x.device)
        is_empty = order >= len(numbers)
        order = order.clamp_(max=max(len(numbers) - 1, 0))
        order, is_empty = _halved(z, order, is_empty, n_levels)
        self.numbers = numbers[order.cpu()].masked_fill(is_empty.cpu(), -1).view(n_leaves, size)  # (L, S)
        self.x = x[order].view(n_leaves, size, -1)  # (L, S, D)
        self.z = z[order].view(n_leaves, size, -1)  # (L, S, P + 1)
        self.low, self.high = self.z.amin(dim=1), self.z.amax(dim=1)  # (L, P + 1)
        self.is_empty = is_empty.view(n_leaves, size)  # (L, S)
        self.x_squared = self.x.square().sum(dim=2).masked_fill_(self.is_empty, torch.inf)  # (L, S)
        # The longest row of each leaf bounds its rounding errors. Empty places repeat a row, so count for nothing.
        self.radius = longest_of(self.x.square().sum(dim=2).amax(dim=1), rows.width)  # (L,)
        self._frame = frame
        self._origin_error = frame.origin_error
        self._z_error = z_error

    def __len__(self) -> int:
        return self.numbers.shape[0]

    def length(self, distance: float) -> float:
        """Return a distance of rows as a length in the frame, infinity where float64 cannot hold it."""
        return self._frame.length(distance)

    def projection_error(self, radius: Tensor) -> Tensor:
        """Return how far a computed projection of rows of these lengths may lie from the true one."""
        return self._z_error * radius + self._origin_error

    def rounding_error(self, radii: Tensor) -> Tensor:
        """Return how far the distance of two rows held here may lie from the true one, given their lengths' sum."""
        return rounding_of(radii) + 2 * self._origin_error

    def gaps(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the distance from a box to each leaf's box: no projected rows are nearer. (P + 1,)² → (L,)."""
        apart = torch.maximum(self.low - high, low - self.high).clamp_(min=0)  # (L, P + 1)
        least: Tensor = torch.linalg.vector_norm(apart, dim=1) * (1 - 1e-5)
        return least

    def reaches(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the largest distance from a box to each leaf's box: none are farther. (P + 1,)² → (L,)."""
        across = torch.maximum(self.high - low, high - self.low)  # (L, P + 1)
        across[:, -1] = self.high[:, -1] + high[-1]  # what lies off the directions may be opposite
        most: Tensor = torch.linalg.vector_norm(across, dim=1) * (1 + 1e-5)
        return most


def longest_of(squared: Tensor, width: int) -> Tensor:
    """Return a bound on lengths whose squares were summed in float32 over `width` terms."""
    return squared.sqrt() * (1 + 1e-4) + width * _TINY


def rounding_of(radii: Tensor) -> Tensor:
    """Return how far rounding two rows to float32 may move their distance, given their lengths' sum."""
    return _UNIT * radii


def product_error(n_terms: int, radii: Tensor) -> Tensor:
    """Return how far |a|² + |b|² - 2ab in float32 may lie from |a - b|², for |a| + |b| <= radii.

    Each of the three sums of n products errs by at most n u / (1 - n u) of the product of lengths, in
    any order; the two additions by u of at most twice the sum of squares. Rows too short to square in
    float32 are covered by the last term.
    """
    unit = _PRODUCT_UNITS[torch.get_float32_matmul_precision()]
    share = (n_terms + 8) * unit / (1 - (n_terms + 8) * unit) if (n_terms + 8) * unit < 0.5 else 1.0
    return share * radii.square() + n_terms * 2.0**-120


def _placed(rows: Rows, numbers: Tensor, frame: Frame) -> tuple[Tensor, Tensor, float]:
    """Return rows in the frame (N, D), and their projections (N, P + 1), both float32, and these's error.

    The last coordinate of a projection is the length of what lies off the directions, so that
    distances of projections never exceed those of the rows.
    """
    n_directions = frame.basis.shape[1]
    x = torch.empty(len(numbers), rows.width, device=rows.device)
    z = torch.empty(len(numbers), n_directions + 1, device=rows.device)
    size = max(1, (1 << 22) // max(rows.width, 1))
    for start in range(0, len(numbers), size):
        exact = (rows.unit(rows.take(numbers[start : start + size])) - frame.centre) * frame.finer  # (n, D) float64
        along = exact @ frame.basis
        off = (exact.square().sum(dim=1) - along.square().sum(dim=1)).clamp_(min=0).sqrt()
        x[start : start + size] = exact.float()
        z[start : start + size] = torch.cat([along, off[:, None]], dim=1).float()
    # float64 sums of D terms under the square root, then one rounding to float32 a coordinate
    error = (4 * rows.width * 2.0**-52) ** 0.5 + 2 * _UNIT
    return x, z, error


def _halved(z: Tensor, order: Tensor, is_empty: Tensor, n_levels: int) -> tuple[Tensor, Tensor]:
    """Sort rows into 2^levels leaves: each part is split at the middle of its widest direction."""
    for level in range(n_levels):
        parts = order.view(1 << level, -1)  # (parts, n)
        here = z[order].view(*parts.shape, -1)  # (parts, n, P + 1)
        widest = here.var(dim=1).argmax(dim=1)  # (parts,)
        values = here.gather(2, widest[:, None, None].expand(-1, parts.shape[1], 1))[..., 0]
        rank = values.argsort(dim=1, stable=True)
        order = parts.gather(1, rank).reshape(-1)
        is_empty = is_empty.view(parts.shape).gather(1, rank).reshape(-1)
    return order, is_empty
