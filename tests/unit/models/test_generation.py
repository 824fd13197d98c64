"""Writing on with a cache gives the states of ordinary passes, and attention of one query is attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sipit import LanguageModel
from sipit.models.generation import OneQueryAttention, one_query_attention
from sipit.observations import Site
from tests.tiny_models import FAMILIES, N_LAYERS, random_ids, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_rows_written_on_are_those_of_ordinary_passes(family: str) -> None:
    lm = LanguageModel(tiny_model(family), name=family)
    rows = torch.stack([random_ids(14, seed=seed) for seed in range(3)])
    cuts: list[tuple[int, Site]] = [(1, "block"), (N_LAYERS, "final")]
    tapped, cache = lm.tapped(cuts), lm.generation_cache(14)
    parts = [tapped.states(part, cache) for part in (rows[:, :3], *rows[:, 3:].split(1, dim=1))]
    for i, cut in enumerate(cuts):
        found = torch.cat([part[i] for part in parts], dim=1)
        expected = torch.stack([lm.cut(*cut).ordinary(ids) for ids in rows])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("masked", ["none", "bool", "additive"])
@pytest.mark.parametrize("n_key_heads", [1, 2, 6])
def test_attention_of_one_query_is_that_of_torch(n_key_heads: int, masked: str) -> None:
    generator = torch.Generator().manual_seed(n_key_heads)
    query = torch.randn(2, 6, 1, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, n_key_heads, 5, 8, generator=generator, dtype=torch.float64)
    visible = torch.tensor([[True, False, True, True, True], [True, True, True, False, False]])[:, None, None]
    mask = {"none": None, "bool": visible, "additive": torch.zeros(visible.shape).masked_fill(~visible, -1e9).double()}
    groups = 6 // n_key_heads
    wide_key, wide_value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    expected = F.scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=mask[masked], scale=0.3)
    torch.testing.assert_close(one_query_attention(query, key, value, attn_mask=mask[masked], scale=0.3), expected)
    with OneQueryAttention():
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[masked], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected)


def test_attention_of_more_queries_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sipit.models.generation.one_query_attention", None)  # calling it would raise
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    plain = F.scaled_dot_product_attention(query, key, key)
    with OneQueryAttention():
        assert torch.equal(F.scaled_dot_product_attention(query, key, key), plain)
