"""Tokens that look apart by their embedding rows and have one state at the cut are both named, never one in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sipit
from sipit import LanguageModel
from sipit.inversion import Inversion
from sipit.models.sites import SITES
from tests.tiny_models import blocks_of, embedding_rows, tiny_model

FIRST, SECOND = 17, 93


def _names_the_truth(found: Inversion, ids: list[int]) -> bool:
    return all(
        token_id in {p.token_id, *(rival.token_id for rival in p.rivals)}
        for token_id, p in zip(ids, found.positions, strict=True)
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("share", [3e-4, 1e-2, 1.0])
@pytest.mark.parametrize("ids", [[SECOND], [5, SECOND, 7], [FIRST, FIRST, SECOND]])
def test_rows_apart_by_a_constant_are_not_told_apart_behind_a_layer_norm(
    family: str, share: float, ids: list[int]
) -> None:
    model = tiny_model(family)
    rows = embedding_rows(model)
    rows[SECOND] = rows[FIRST] + share * rows[FIRST].norm() / 32**0.5
    lm = LanguageModel(model)
    found = sipit.invert(lm, lm.capture(input_ids=ids, site="final"))
    assert found.verdict == "ambiguous"
    assert _names_the_truth(found, ids)
    block = sipit.invert(lm, lm.capture(input_ids=ids, layer=2))  # where the constant is still there
    assert (block.verdict, block.input_ids) == ("recovered", tuple(ids)) or _names_the_truth(block, ids)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gpt_neox", "opt"])
@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("ids", [[SECOND], [5, SECOND, 7]])
def test_rows_nearer_than_the_tolerance_behind_a_huge_coordinate_are_both_checked(
    family: str, layer: int, ids: list[int]
) -> None:
    model = tiny_model(family)
    rows = embedding_rows(model)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    rows[SECOND] = rows[FIRST] + 3e-4 * rows[FIRST].norm() * direction
    last: Any = [m for m in blocks_of(model)[1].modules() if type(m).__name__ in ("Linear", "Conv1D")][-1]
    if last.bias is None:
        last.bias = torch.nn.Parameter(torch.zeros(32))
    last.bias.data[3] += 3000
    lm = LanguageModel(model)
    found = sipit.invert(lm, lm.capture(input_ids=ids, layer=layer))
    assert found.input_ids == tuple(ids) or found.verdict == "ambiguous"
    assert _names_the_truth(found, ids)


@pytest.mark.parametrize("ignores_mean", [False, True])
def test_rows_within_a_radius_are_those_that_brute_force_finds(ignores_mean: bool) -> None:
    lm = LanguageModel(tiny_model("llama"))
    rows = embedding_rows(lm.model).double()
    if ignores_mean:
        rows = rows - rows.mean(dim=1, keepdim=True)
    for token_id in range(0, lm.vocab_size, 7):
        gaps = (rows - rows[token_id]).norm(dim=1)
        radius = float(gaps.sort().values[9])
        expected = [i for i in gaps.argsort(stable=True).tolist() if i != token_id and gaps[i] <= radius]
        assert lm.embeddings.within(token_id, radius, ignores_mean=ignores_mean) == expected


def test_only_layer_norms_forget_the_mean() -> None:
    forgets = {
        family: LanguageModel(tiny_model(family)).ignores_mean(SITES["final"]) for family in ("gpt2", "opt", "llama")
    }
    assert forgets == {"gpt2": True, "opt": True, "llama": False}
