"""A rounding that was done shows in the values, and half a step of it covers what it moved; else nothing shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sipit.observations.rounding import as_rounded, of_decimals, of_float8, recognised

_STORED = (torch.float32, torch.float16, torch.bfloat16)


def _values(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(12, 128, generator=generator) * torch.rand(12, 1, generator=generator) * 5
    values[:, 7] *= 40  # a massive coordinate, as states have
    return values


def _integers(group: int | None, most: int) -> Callable[[Tensor], Tensor]:
    def rounded(values: Tensor) -> Tensor:
        groups = values.reshape(1, -1) if group is None else values.reshape(-1, group)
        step = groups.abs().amax(dim=1, keepdim=True) / most
        return ((groups / step).round() * step).reshape(values.shape)

    return rounded


def _asymmetric(values: Tensor) -> Tensor:
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    step = (high - low) / 255
    zero = (-low / step).round()
    return (((values / step).round() + zero).clamp(0, 255) - zero) * step


def _float8(dtype: torch.dtype, *, is_scaled: bool) -> Callable[[Tensor], Tensor]:
    def rounded(values: Tensor) -> Tensor:
        scale = values.abs().amax(dim=1, keepdim=True) / torch.finfo(dtype).max if is_scaled else torch.tensor(1.0)
        return (values / scale).to(dtype).float() * scale

    return rounded


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "8-bit integers, one scale": _integers(None, 127),
    "8-bit integers, a scale a row": _integers(128, 127),
    "8-bit integers in groups of 32": _integers(32, 127),
    "4-bit integers, a scale a row": _integers(128, 7),
    "4-bit integers in groups of 32": _integers(32, 7),
    "float8_e4m3fn": _float8(torch.float8_e4m3fn, is_scaled=False),
    "float8_e5m2": _float8(torch.float8_e5m2, is_scaled=False),
    "float8_e4m3fn, a scale a row": _float8(torch.float8_e4m3fn, is_scaled=True),
    "float8_e5m2, a scale a row": _float8(torch.float8_e5m2, is_scaled=True),
}


@pytest.mark.parametrize("dtype", _STORED)
@pytest.mark.parametrize("says", _ROUNDINGS)
def test_rounding_is_recognised_and_half_a_step_covers_it(says: str, dtype: torch.dtype) -> None:
    values = _values()
    stored = _ROUNDINGS[says](values).to(dtype)
    found = recognised(stored)
    assert found is not None
    assert found.says == says
    own = stored.double().abs() * torch.finfo(dtype).eps  # of the dtype it is stored in
    moved = (stored.double() - values.double()).abs()
    assert bool((moved <= found.half_step * (1 + 1e-6) + own).all())
    assert bool((found.half_step <= values.abs().amax(dim=1, keepdim=True)).all())


def test_zero_point_changes_nothing() -> None:
    found = recognised(_asymmetric(_values()))
    assert found is not None
    assert found.says == "8-bit integers, a scale a row"


@pytest.mark.parametrize("dtype", _STORED)
@pytest.mark.parametrize("seed", range(5))
def test_values_that_were_not_rounded_show_nothing(seed: int, dtype: torch.dtype) -> None:
    assert recognised(_values(seed).to(dtype)) is None


def test_zeros_show_nothing() -> None:
    assert recognised(torch.zeros(3, 8)) is None


def test_one_value_off_the_grid_denies_it() -> None:
    stored = _integers(128, 127)(_values())
    stored[5, 9] += 0.3 * stored[5].abs().max() / 127
    assert recognised(stored) is None


def test_scales_that_lie_beside_are_used() -> None:
    values = _values()
    scales = values.abs().amax(dim=1) / 448
    stored = (values / scales[:, None]).to(torch.float8_e4m3fn).float() * scales[:, None]
    found = of_float8(stored, scales, torch.float8_e4m3fn)
    assert bool(((stored - values).abs() <= found.half_step * (1 + 1e-5)).all())


def test_decimals_are_half_a_last_digit_off() -> None:
    assert float(of_decimals(torch.ones(2, 3), 4).half_step.max()) == pytest.approx(5e-5)


def test_widened_values_go_back_to_their_dtype() -> None:
    narrow, says, half_step = as_rounded(_values().bfloat16().float())
    assert (narrow.dtype, says, half_step) == (torch.bfloat16, None, None)


def test_integer_grid_of_an_embedding_is_the_models_own() -> None:
    stored = _integers(32, 7)(_values())
    assert as_rounded(stored)[2] is not None
    assert as_rounded(stored, is_embedding=True)[2] is None
