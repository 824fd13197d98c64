"""Laid-out weights give the same states, share every weight, and follow a weight that changes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from sipit.models import prepacked as module
from sipit.models.prepacked import prepacked
from tests.tiny_models import FAMILIES, random_ids, tiny_model, weights_digest

needs_onednn = pytest.mark.skipif(not module._serves(torch.float32), reason="this build has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("family", FAMILIES)
def test_prepacked_model_gives_the_states_of_the_plain_one(family: str) -> None:
    model = tiny_model(family)
    digest = weights_digest(model)
    ids = random_ids(7, seed=1)[None]
    fast = prepacked(model)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        n_before = len(module._layouts)
        torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(module._layouts) > n_before  # else this test compares a model with itself
    assert weights_digest(model) == digest
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}


@needs_onednn
def test_changed_weight_is_laid_out_again() -> None:
    linear = nn.Linear(8, 4)
    fast, rows = prepacked(linear), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(rows), linear(rows))
        linear.weight.mul_(2)
        torch.testing.assert_close(fast(rows), linear(rows))


@pytest.mark.skipif(not module._serves(torch.bfloat16), reason="this processor lays no bfloat16 weights out")
def test_autocast_to_bfloat16_has_a_layout_of_its_own() -> None:
    linear, rows = nn.Linear(64, 32), torch.randn(5, 64)
    fast = prepacked(linear)
    with torch.no_grad():
        exact = fast(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = fast(rows)
            torch.testing.assert_close(rounded, linear(rows), rtol=0.02, atol=0.02)
    assert rounded.dtype == torch.bfloat16
    assert set(module._layouts[linear]) == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(exact, linear(rows).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processor_that_lays_nothing_out_takes_the_plain_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: object) -> None:
        raise RuntimeError("bf16 path needs the cpu support avx512bw")

    monkeypatch.setattr(module, "_reordered", refused)
    module._serves.cache_clear()
    linear, rows = nn.Linear(64, 32), torch.randn(5, 64)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert torch.equal(prepacked(linear)(rows), linear(rows))
        assert linear not in module._layouts
        matrix = torch.randn(6, 8, dtype=dtype)
        assert torch.equal(module.PrepackedMatrix(matrix).product(rows[:, :8]), rows[:, :8].to(dtype) @ matrix.T)
    finally:
        module._serves.cache_clear()


@needs_onednn
def test_weight_too_large_to_lay_out_takes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, rows = nn.Linear(8, 8), torch.randn(2, 8)
    monkeypatch.setattr(module, "_LARGEST", 8 * 8 * 4 - 1)
    with torch.no_grad():
        torch.testing.assert_close(prepacked(linear)(rows), linear(rows))
    assert linear not in module._layouts


def test_gradients_other_dtypes_and_autocast_to_float16_take_the_plain_way() -> None:
    linear = nn.Linear(8, 4)
    fast, rows = prepacked(linear), torch.randn(3, 8, requires_grad=True)
    fast(rows).sum().backward()
    assert rows.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.float16):
            torch.testing.assert_close(fast(rows), linear(rows))
        torch.testing.assert_close(prepacked(linear.double())(rows.double()), linear(rows.double()))
    assert len([m for m in module._layouts if m is linear]) == 0


@needs_onednn
def test_memory_is_bounded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    monkeypatch.setattr(module, "_MOST_BYTES", module._held_bytes() + 8 * 8 * 4)
    first, second, rows = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(prepacked(first)(rows), first(rows))
        torch.testing.assert_close(prepacked(second)(rows), second(rows))
    assert first in module._layouts
    assert second not in module._layouts
    n_before = len(module._layouts)
    del first
    gc.collect()
    assert len(module._layouts) == n_before - 1


def test_module_without_linear_maps_is_returned_as_it_is() -> None:
    norm = nn.Sequential(nn.LayerNorm(4))
    assert prepacked(norm) is norm


@pytest.mark.parametrize("is_available", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_a_laid_out_matrix(
    dtype: torch.dtype, is_available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_available:
        monkeypatch.setattr(module, "_serves", lambda _: False)
    generator = torch.Generator().manual_seed(0)
    matrix, rows = torch.randn(12, 8, generator=generator), torch.randn(5, 8, generator=generator)
    found = module.PrepackedMatrix(matrix.to(dtype)).product(rows)
    assert found.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.float(), rows @ matrix.T, rtol=atol, atol=atol)


@needs_onednn
def test_layouts_are_forgotten_and_made_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rows = torch.randn(3, 8)
    with torch.no_grad():
        before = prepacked(model)(rows)
        assert module._held_bytes() > 0
        held = module._held_bytes()
        module.drop_prepacked(model)
        assert module._held_bytes() == held - 2 * 8 * 8 * 4
        assert torch.equal(prepacked(model)(rows), before)
        assert module._held_bytes() == held
