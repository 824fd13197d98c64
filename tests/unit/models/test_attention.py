"""Attention that copies no keys is attention; a model's own goes by it, and the caller's model does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sipit import LanguageModel
from sipit.models.attention import attention, lean_attention
from sipit.observations import Cut
from tests.tiny_models import FAMILIES, random_ids, tiny_model

_MASKS = ["none", "bool", "additive"]


class _Grouped(nn.Module):
    """What transformers looks at in an attention module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups: int = groups


def _shapes(n_queries: int, n_key_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries of 6 heads, keys and values of 5 tokens, and who sees whom."""
    generator = torch.Generator().manual_seed(n_key_heads)
    query = torch.randn(2, 6, n_queries, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, n_key_heads, 5, 8, generator=generator, dtype=torch.float64)
    visible = torch.rand(2, 1, n_queries, 5, generator=generator) < 0.6
    visible[..., 0] = True
    return query, key, value, visible


@pytest.mark.parametrize("masked", _MASKS)
@pytest.mark.parametrize("n_key_heads", [1, 2, 6])
@pytest.mark.parametrize("n_queries", [1, 3])
def test_attention_is_that_of_torch(n_queries: int, n_key_heads: int, masked: str) -> None:
    query, key, value, visible = _shapes(n_queries, n_key_heads)
    mask = {"none": None, "bool": visible, "additive": torch.zeros(visible.shape).masked_fill(~visible, -1e9).double()}
    groups = 6 // n_key_heads
    wide_key, wide_value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    expected = F.scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=mask[masked], scale=0.3)
    found, _ = attention(_Grouped(groups), query, key, value, mask[masked], scaling=0.3, is_causal=False)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_more_queries_without_a_mask_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.zeros(1), None
    monkeypatch.setattr("sipit.models.attention.sdpa_attention_forward", lambda *_, **__: own)
    query, key, value, _ = _shapes(3, 2)
    assert attention(nn.Module(), query, key, value, None) is own


@pytest.mark.parametrize("unusual", [{"position_bias": torch.zeros(1)}, {"softcap": 3.0}, {"dropout": 0.1}])
def test_arguments_it_does_not_know_are_left_to_torch(unusual: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.zeros(1), None
    monkeypatch.setattr("sipit.models.attention.sdpa_attention_forward", lambda *_, **__: own)
    query, key, value, visible = _shapes(1, 2)
    assert attention(nn.Module(), query, key, value, visible, **unusual) is own


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_lean_attention_gives_its_states(family: str) -> None:
    model = tiny_model(family)
    names = [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]
    ids = random_ids(12, seed=1)[None]
    with torch.no_grad():
        torch.testing.assert_close(lean_attention(model)(ids)[0], model(ids)[0], rtol=1e-5, atol=1e-5)
    assert [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")] == names


def test_packed_passes_of_a_model_whose_heads_share_keys_copy_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    cut = LanguageModel(model, name="llama").cut(Cut(2))
    row = cut.row(random_ids(4, seed=0))
    n_heads: list[int] = []  # of the keys of each call
    torchs = F.scaled_dot_product_attention

    def spied(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        n_heads.append(key.shape[1])
        return torchs(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    row.run(random_ids(3, seed=1), torch.full((3,), 4))
    assert n_heads == [model.config.num_key_value_heads] * 2
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    row.run(random_ids(1, seed=2), torch.full((1,), 4))
    assert len(n_heads) == 2  # one query goes by products
