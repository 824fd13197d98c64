"""Rows out of order and columns behind one permutation are put in order, and the order is part of the claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sipit
from sipit import LanguageModel, Observation
from sipit.cli import main
from sipit.errors import CertificateError, InputError, OptionError
from sipit.inversion import certificate_of, check_certificate
from sipit.observations import Site, write_observation
from tests.tiny_models import FAMILIES, random_ids, tiny_model

IDS = random_ids(9, seed=5)


def _mixed(seen: Observation, *, rows: bool, columns: bool, seed: int = 0) -> Observation:
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(seen.seq_len, generator=draw).tolist() if rows else ()
    others = torch.randperm(seen.d_model, generator=draw).tolist() if columns else ()
    return seen.arranged(row_order=order, column_order=others)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True), (True, True)])
def test_rows_and_columns_are_put_in_order(family: str, rows: bool, columns: bool) -> None:
    lm = LanguageModel(tiny_model(family))
    seen = lm.capture(input_ids=IDS, layer=2)
    given = _mixed(seen, rows=rows, columns=columns)
    found = sipit.invert(lm, given, is_shuffled=rows, is_permuted=columns)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert torch.equal(given.arranged(row_order=found.row_order, column_order=found.column_order).states, seen.states)
    assert (bool(found.row_order), bool(found.column_order)) == (rows, columns)
    assert check_certificate(certificate_of(found), given, lm).holds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_rows_are_put_in_order(dtype: torch.dtype, llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=IDS, layer=2)
    given = _mixed(replace(seen, states=seen.states.to(dtype)), rows=True, columns=True)
    found = sipit.invert(llama, given, is_shuffled=True, is_permuted=True)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))


def test_rows_behind_a_known_prefix_are_put_in_order(llama: LanguageModel) -> None:
    rows = llama.capture(input_ids=IDS, layer=2).states[4:].flip(0)
    found = sipit.invert(llama, rows, layer=2, known_prefix=IDS[:4], is_shuffled=True)
    assert (found.verdict, found.input_ids, found.row_order) == ("recovered", tuple(IDS[4:].tolist()), (4, 3, 2, 1, 0))


def test_a_bag_with_a_foreign_row_recovers_nothing_false(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=IDS, layer=2)
    rows = seen.states.clone()
    rows[5] = llama.capture(input_ids=random_ids(9, seed=6), layer=2).states[5]
    found = sipit.invert(llama, _mixed(replace(seen, states=rows), rows=True, columns=False), is_shuffled=True)
    assert found.verdict == "unmatched"
    assert found.input_ids == tuple(IDS.tolist())[: len(found.input_ids)]
    assert len(found.input_ids) == 5


def test_a_certificate_does_not_hold_in_another_order(llama: LanguageModel) -> None:
    given = _mixed(llama.capture(input_ids=IDS, layer=2), rows=True, columns=True)
    found = sipit.invert(llama, given, is_shuffled=True, is_permuted=True)
    rows, columns = found.row_order, found.column_order
    for order in ((rows[1], rows[0], *rows[2:]), ()):
        assert not check_certificate(certificate_of(replace(found, row_order=order)), given, llama).holds
    for order in ((columns[1], columns[0], *columns[2:]), ()):
        assert not check_certificate(certificate_of(replace(found, column_order=order)), given, llama).holds
    for none in (replace(found, row_order=(rows[0], *rows[:-1])), replace(found, column_order=columns[:-1])):
        with pytest.raises(CertificateError, match="cannot be used"):
            check_certificate(certificate_of(none), given, llama)


@pytest.mark.parametrize("site", ["kv", "logits"])
def test_values_that_are_no_states_are_refused(site: Site, llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=IDS, layer=None if site == "logits" else 2, site=site)
    with pytest.raises(OptionError, match="takes block or final"):
        sipit.invert(llama, seen, is_shuffled=True)


def test_what_an_order_cannot_be_found_with_is_refused(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=IDS, layer=2)
    with pytest.raises(OptionError, match="without a hint, noise or pass_dtype"):
        sipit.invert(llama, seen, is_shuffled=True, hint=[1])
    with pytest.raises(OptionError, match="one is held of every position"):
        sipit.invert(llama, replace(seen, positions=tuple(range(0, 18, 2))), is_shuffled=True)
    with pytest.raises(InputError, match="names each of them once"):
        seen.arranged(row_order=[0] * 9)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(3)))
def test_an_order_and_its_inverse_leave_an_observation_as_it_was(rows: list[int], columns: list[int]) -> None:
    seen = Observation(states=torch.arange(12.0).reshape(4, 3), layer=1, half_step=torch.rand(4, 3))
    mixed = seen.arranged(row_order=rows, column_order=columns)
    back = mixed.arranged(
        row_order=[rows.index(i) for i in range(4)], column_order=[columns.index(i) for i in range(3)]
    )
    assert back.digest() == seen.digest()


@pytest.mark.thorough
def test_the_command_line_puts_rows_in_order(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = sipit.load(str(text_folder))
    given = _mixed(lm.capture("Out of order, out of mind", layer=2), rows=True, columns=True)
    write_observation(given, tmp_path / "mixed")
    record = tmp_path / "record.json"
    arguments = ["--model", str(text_folder), "--shuffled", "--permuted", "--json", str(record)]
    assert main(["invert", str(tmp_path / "mixed"), *arguments]) == 0
    assert capsys.readouterr().out.strip() == "Out of order, out of mind"
    assert main(["check", str(record), str(tmp_path / "mixed"), "--model", str(text_folder)]) == 0
