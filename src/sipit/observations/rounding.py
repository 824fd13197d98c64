"""Which coarse rounding values went through, told from the values, and how far it moved each of them.

Stored activations are often scaled to integers or 8-bit floats and back. The grid they then lie on shows in
the values, and half a step of it is all that the rounding can have moved them. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.float64 import as_float64

_MOST_LEVELS = 255  # of an 8-bit integer grid, on one side of zero
_LEVELS_4_BIT = 15
_GROUPS = (256, 128, 64, 32)  # values that share a scale, in rows or in blocks of a row
_FEW = 16  # values of a row that are looked at before the others
_ROWS_AT_ONCE = 256
_LOOKED_AT = 4  # rows that decide whether a grid is there at all
_NARROW = (torch.bfloat16, torch.float16, torch.float32)  # dtypes values may have had before they were widened
_FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# Dettmers et al., QLoRA (arXiv 2305.14314), appendix E: quantiles of the normal distribution, in units of the
# largest magnitude of a block.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounding:
    """A rounding that values went through."""

    says: str  # what it is, in a few words
    half_step: Tensor  # (T, W) float32: the most that it moved each value


def recognised(values: Tensor) -> Rounding | None:
    """Return the coarsest known rounding that all values went through; None if they went through none of those.

    Args:
        values: (T, W) floats. Rows of zeros say nothing.
    """
    wide = as_float64(values)
    rows = wide[wide.bool().any(dim=1)]
    if not len(rows):
        return None
    slack = torch.finfo(values.dtype).eps
    looked_at = rows[:_LOOKED_AT]
    for says, steps_of in _schemes(values.shape[1]):
        if steps_of(rows[:1], slack, True) is not None and steps_of(looked_at, slack, False) is not None:
            steps = steps_of(wide, slack, False)
            if steps is not None:
                return Rounding(says=says, half_step=(steps / 2).to(values.device, torch.float32))
    return None


def as_rounded(values: Tensor, *, is_embedding: bool = False) -> tuple[Tensor, str | None, Tensor | None]:
    """Return values in the narrowest dtype that holds them all, a coarser rounding they show, and its half steps.

    Args:
        values: (T, W) floats, 8-bit ones among them.
        is_embedding: whether they are rows of an embedding, which the model itself may hold rounded: integer
            grids say nothing of what happened to them then.

    Returns:
        (T, W) of the narrowest dtype; in words, or None; (T, W) or None.
    """
    if values.dtype in _FLOATS_8:
        values = values.float()
    found = recognised(values)
    if found is not None and not (is_embedding and "bit" in found.says):
        return narrowed(values), found.says, found.half_step
    return narrowed(values), None, None


def narrowed(values: Tensor) -> Tensor:
    """Return values in the narrowest dtype that holds each of them exactly. (T, W) → (T, W)."""
    for dtype in _NARROW:
        if dtype.itemsize < values.dtype.itemsize and torch.equal(values.to(dtype).to(values.dtype), values):
            return values.to(dtype).contiguous()
    return values.contiguous()


def of_float8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Rounding:
    """Return the rounding of values that were 8-bit floats times a scale a row. (T, W), (T,)."""
    quotients = values.double() / scales.double()[:, None]
    return Rounding(
        says=f"{_short(dtype)} with a scale a row", half_step=(_step8(quotients, dtype) / 2 * scales[:, None]).float()
    )


def of_decimals(values: Tensor, n: int) -> Rounding:
    """Return the rounding of values written with n digits behind the point. (T, W)."""
    return Rounding(says=f"{n} decimals", half_step=torch.full(values.shape, 0.5 * 10.0**-n))


# (T, W) float64, eps of the stored dtype, whether only a no counts, for which one group is enough → (T, W) steps, or
# None
_Steps = Callable[[Tensor, float, bool], Tensor | None]


def _schemes(width: int) -> Iterator[tuple[str, _Steps]]:
    """Yield known roundings, the coarsest first: a grid of few levels lies on finer ones too."""
    groups = [group for group in _GROUPS if width % group == 0 and width > group]
    for bits, most in ((4, _LEVELS_4_BIT), (8, _MOST_LEVELS)):
        integers = _integer_steps(most)
        yield f"{bits}-bit integers, one scale", _grouped(None, integers)
        yield f"{bits}-bit integers, a scale a row", integers
        yield from ((f"{bits}-bit integers in groups of {group}", _grouped(group, integers)) for group in groups)
        if bits == 4:
            yield "nf4, a scale a row", _nf4_steps
            yield from ((f"nf4 in groups of {group}", _grouped(group, _nf4_steps)) for group in groups)
            for dtype in _FLOATS_8:
                yield _short(dtype), _plain8(dtype)
                yield f"{_short(dtype)}, one scale", _grouped(None, _scaled8(dtype))
                yield f"{_short(dtype)}, a scale a row", _scaled8(dtype)


def _grouped(group: int | None, steps_of: _Steps) -> _Steps:
    """Return a search with a scale for each group of values, or one for all of them (None)."""

    def steps(values: Tensor, slack: float, is_glance: bool) -> Tensor | None:
        groups = values.reshape(1, -1) if group is None else values.reshape(-1, group)
        found = steps_of(groups[:1] if is_glance else groups, slack, is_glance)
        return found if found is None or is_glance else found.reshape(values.shape)

    return steps


def _integer_steps(most: int) -> _Steps:
    """Return a search for the widest step whose whole multiples, up to `most` of them, a row's values all are."""

    def steps(values: Tensor, slack: float, is_glance: bool) -> Tensor | None:
        largest = values.abs().amax(dim=1)  # (N,)
        step = torch.zeros_like(largest)
        for part in (largest > 0).nonzero()[:, 0].split(_ROWS_AT_ONCE):
            sizes = largest[part] / torch.arange(1, most + 1, dtype=largest.dtype)[:, None]  # (L, N)
            may_fit = _are_whole(values[part, :_FEW], sizes, slack)  # few values show of most that they do not
            if not bool(may_fit.any(dim=0).all()):
                return None
            for level in may_fit.any(dim=1).nonzero()[:, 0].tolist():
                chosen = may_fit[level] & (step[part] == 0)
                rows = part[chosen]
                fits = _are_whole(values[rows], sizes[level, chosen], slack)
                step[rows[fits]] = sizes[level, chosen][fits]
        if bool(((largest > 0) & (step == 0)).any()):
            return None
        if not is_glance and _is_chance(values, step, slack, most):
            return None
        return step[:, None].expand_as(values)

    return steps


def _are_whole(values: Tensor, size: Tensor, slack: float) -> Tensor:
    """Return which rows are whole multiples of a size each. (N, G), (…, N) → (…, N) bool."""
    multiples = values / size[..., None]
    whole = multiples.round()
    return ((multiples - whole).abs() <= 2 * slack * whole.abs() + 1e-12).all(dim=-1)


def _is_chance(values: Tensor, step: Tensor, slack: float, most: int) -> bool:
    """Whether a grid says little: so few values, or so short a mantissa, that it would fit by luck.

    A value q steps long hits the grid by luck with probability 4 q times `slack`; a grid is believed where all
    values together do so less than once in 2^40 tries, over the steps that were tried.
    """
    safe = torch.where(step > 0, step, 1.0)
    luck = (4 * slack * (values / safe[:, None]).abs()).clamp(1e-9, 1)  # (N, G)
    bits = -luck.log2().sum(dim=1)[step > 0]
    return bool(len(bits)) and float(bits.mean()) < 40 + torch.tensor(float(most)).log2().item()


def _nf4_steps(values: Tensor, slack: float, _: bool) -> Tensor | None:
    levels = torch.tensor(_NF4, dtype=torch.float64)
    largest = values.abs().amax(dim=1, keepdim=True)  # (N, 1)
    quotients = values / torch.where(largest > 0, largest, 1.0)
    nearest = torch.bucketize(quotients, (levels[1:] + levels[:-1]) / 2)
    if not bool(((quotients - levels[nearest]).abs() <= 2 * slack).all() and (largest > 0).any()):
        return None
    gaps = levels[1:] - levels[:-1]
    steps = torch.maximum(gaps[nearest.clamp(max=14)], gaps[(nearest - 1).clamp(min=0)])
    return steps * largest


def _plain8(dtype: torch.dtype) -> _Steps:
    def steps(values: Tensor, _slack: float, _is_glance: bool) -> Tensor | None:
        return _step8(values, dtype) if bool(_are_floats8(values, dtype, 0.0).all()) else None

    return steps


def _scaled8(dtype: torch.dtype) -> _Steps:
    """Return a search for a scale a row at which all its values are 8-bit floats: its largest is one of few."""
    most = torch.finfo(dtype).max
    mantissas = 1 << (2 if dtype == torch.float8_e5m2 else 3)
    power = 2.0 ** int(torch.tensor(most).log2())
    tops = [most, *(size * (1 + m / mantissas) for size in (power, power / 2) for m in range(mantissas))]
    tops = [top for top in tops if top <= most]

    def steps(values: Tensor, slack: float, _: bool) -> Tensor | None:
        largest = values.abs().amax(dim=1)  # (N,)
        found = torch.zeros_like(values)
        waiting = largest > 0
        scales = largest / torch.tensor(tops, dtype=values.dtype)[:, None]  # (L, N)
        quotients = values[:, :_FEW] / torch.where(waiting, scales, 1.0)[..., None]  # (L, N, G)
        may_fit = _are_floats8(quotients.flatten(0, 1), dtype, 2 * slack).view(scales.shape)
        for level in may_fit.any(dim=1).nonzero()[:, 0].tolist():
            rows = (may_fit[level] & waiting).nonzero()[:, 0]
            scale = scales[level, rows][:, None]
            fits = _are_floats8(values[rows] / scale, dtype, 2 * slack)
            found[rows[fits]] = (_step8(values[rows] / scale, dtype) * scale)[fits]
            waiting[rows[fits]] = False
        return None if bool(waiting.any()) else found

    return steps


def _are_floats8(values: Tensor, dtype: torch.dtype, slack: float) -> Tensor:
    """Return in which rows all values are such floats, but for a relative error. (N, W) → (N,) bool.

    Too short a mantissa tells nothing.
    """
    if slack > 2.0**-6:
        return torch.zeros(len(values), dtype=torch.bool)
    nearest = _nearest8(values, dtype)
    is_in_range = values.abs() <= torch.finfo(dtype).max * (1 + slack)
    return (is_in_range & ((values - nearest).abs() <= slack * nearest.abs())).all(dim=1)


def _nearest8(values: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return values.float().clamp(-most, most).to(dtype).double()


def _step8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring 8-bit floats above each value, which is one but for an error."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(_nearest8(values, dtype).abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps / 2), exponent)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
