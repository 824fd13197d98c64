"""Scores of every token in fast arithmetic are those of float32, but for what no order feels."""

from __future__ import annotations

import pytest
import torch

from sipit import LanguageModel
from sipit.inversion.inverses import token_keys as token_keys_module
from sipit.inversion.inverses.arithmetic import Int8Matrix, in_int8
from sipit.inversion.inverses.token_keys import TokenKeys

_ARITHMETIC = {"float32": (False, False), "bfloat16": (True, False), "int8": (False, True)}


def _keys(lm: LanguageModel, name: str, monkeypatch: pytest.MonkeyPatch) -> TokenKeys:
    in_bfloat16, in_integers = _ARITHMETIC[name]
    monkeypatch.setattr(token_keys_module, "is_fast_in_bfloat16", lambda _: in_bfloat16)
    monkeypatch.setattr(token_keys_module, "is_fast_in_int8", lambda _: in_integers)
    return TokenKeys(lm)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_fast_scores_are_near_and_the_best_of_them_exact(
    name: str, llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = (_keys(llama, each, monkeypatch) for each in ("float32", name))
    queries = torch.randn(7, plain.width, generator=torch.Generator().manual_seed(0))
    wanted, found = plain.scores(queries), fast.scores(queries)
    best = wanted.argmax(dim=1)
    assert torch.equal(found.argmax(dim=1), best)
    rows = torch.arange(len(queries))
    torch.testing.assert_close(found[rows, best], wanted[rows, best], rtol=4e-3, atol=0.0)  # lengths are rounded too
    assert float((found - wanted).abs().max()) < 0.02 * float(queries.norm(dim=1).max())
    assert not torch.equal(found, wanted)  # it did take the fast way


def test_products_of_8_bit_rows_are_off_by_their_rounding_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, vectors = torch.randn(50, 64, generator=draw), torch.randn(9, 64, generator=draw)
    rows[3], vectors[2] = 0.0, 0.0
    found = Int8Matrix([in_int8(rows[:20]), in_int8(rows[20:])]).product(vectors)
    wanted = vectors.double() @ rows.double().T
    scale = (vectors.abs().amax(dim=1)[:, None] * rows.abs().amax(dim=1)).double()
    assert bool(((found - wanted).abs() <= 64 * scale / 127 + 1e-12).all())
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    assert not found[2].any()
    assert not found[:, 3].any()


def test_neighbours_found_in_one_go_are_those_found_one_by_one(llama: LanguageModel) -> None:
    together, alone = TokenKeys(llama), TokenKeys(llama)
    together.remember([5, 9, 5, 11])
    assert [together.nearest(i, 4, -1.0) for i in (5, 9, 11)] == [alone.nearest(i, 4, -1.0) for i in (5, 9, 11)]
