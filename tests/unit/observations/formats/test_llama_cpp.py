"""Session and slot files of llama.cpp: keys and values of each block, the ids in clear, and nothing quantised."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sipit.errors import InputError, OptionError
from tests.unit.observations.formats.llama_files import memory, packed, session, slot
from tests.unit.observations.formats.reading import all_of, dumps_of, error_of

IDS = (5, 6, 7)


def _rows(seed: int, width: int = 8, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


KEYS, VALUES = [_rows(1), _rows(2)], [_rows(3), _rows(4)]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_outputs", [False, True])
def test_blocks_of_a_session_are_read(tmp_path: Path, is_transposed: bool, has_outputs: bool) -> None:
    path = session(tmp_path / "a", IDS, memory(KEYS, VALUES, is_transposed=is_transposed), has_outputs=has_outputs)
    found = dumps_of(path)
    assert [(dump.layer, dump.site, dump.input_ids) for dump in found] == [(0, "kv", IDS), (1, "kv", IDS)]
    for dump, keys, values in zip(found, KEYS, VALUES, strict=True):
        assert torch.equal(dump.values, torch.cat([keys, values], dim=1))
        assert dump.is_interleaved
        assert "in clear" in dump.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_of_a_slot_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    keys, values = [rows.to(dtype) for rows in KEYS], [rows.to(dtype) for rows in VALUES]
    (dump,) = dumps_of(slot(tmp_path / "a", IDS, memory(keys, values)), layer=1, site="values")
    assert torch.equal(dump.values, values[1])
    assert not dump.is_interleaved


def test_keys_without_an_architecture_are_refused(tmp_path: Path) -> None:
    assert "--site values" in str(error_of(slot(tmp_path / "a", IDS, memory(KEYS, VALUES)), layer=0, site="keys"))


def test_architecture_with_halves_is_taken_as_it_is(tmp_path: Path) -> None:
    path = session(tmp_path / "a", IDS, memory(KEYS, VALUES), architecture="qwen2")
    assert not dumps_of(path, layer=0)[0].is_interleaved


def test_cells_are_put_in_the_order_of_their_positions(tmp_path: Path) -> None:
    (dump,) = dumps_of(slot(tmp_path / "a", IDS, memory(KEYS, VALUES, cells=(2, 0, 1))), layer=0, site="values")
    assert torch.equal(dump.values, VALUES[0][[1, 2, 0]])


def test_window_that_dropped_the_first_rows_says_where_it_begins(tmp_path: Path) -> None:
    (dump,) = dumps_of(slot(tmp_path / "a", range(9), memory(KEYS, VALUES, cells=(4, 5, 6))), layer=0, site="values")
    assert (dump.positions_from, dump.input_ids) == (4, (4, 5, 6))


def test_two_caches_leave_the_block_open(tmp_path: Path) -> None:
    path = slot(tmp_path / "a", IDS, memory(KEYS, VALUES) + memory(KEYS, VALUES))
    assert [dump.layer for dump in dumps_of(path, site="values")] == [None] * 4


@pytest.mark.parametrize("is_transposed", [False, True])
def test_files_of_october_2026_say_that_nothing_is_rotated(tmp_path: Path, is_transposed: bool) -> None:
    held = memory(KEYS, VALUES, rotation=(0, 0), is_transposed=is_transposed)
    (dump,) = dumps_of(slot(tmp_path / "a", packed(IDS), held, version=4), layer=1, site="values")
    assert torch.equal(dump.values, VALUES[1])
    assert dump.input_ids == IDS
    assert "the 3 token ids" in dump.notes[0]
    found = dumps_of(session(tmp_path / "b", IDS, held, version=11))
    assert torch.equal(found[1].values, torch.cat([KEYS[1], VALUES[1]], dim=1))


@pytest.mark.parametrize("rotation", [(64, 0), (0, 64)])
def test_rotated_rows_are_refused_with_the_way_out(tmp_path: Path, rotation: tuple[int, int]) -> None:
    held = memory(KEYS, VALUES, rotation=rotation)
    assert "f16" in str(error_of(slot(tmp_path / "a", IDS, held, version=4), site="values"))


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        (packed(IDS, n_media=1), "images"),
        (packed(IDS, version=2), "packs its tokens"),
        (packed(IDS)[:-1], "packs its tokens"),
        ([-1], "packs its tokens"),
        ([-1, 1, -5, 0, 0], "packs its tokens"),
    ],
)
def test_other_packings_are_refused(tmp_path: Path, ids: list[int], word: str) -> None:
    path = slot(tmp_path / "a", ids, memory(KEYS, VALUES, rotation=(0, 0)), version=4)
    assert word in str(error_of(path, site="values"))


def test_quantised_cache_is_refused_with_the_way_out(tmp_path: Path) -> None:
    raw = slot(tmp_path / "a", IDS, memory(KEYS, VALUES)).read_bytes()
    head = 12 + 4 * 3 + 8 + 3 * 12 + 8
    (tmp_path / "b").write_bytes(raw[:head] + struct.pack("<i", 8) + raw[head + 4 :])
    assert "f16" in str(error_of(tmp_path / "b"))


@pytest.mark.parametrize("damage", ["cut", "version", "longer", "cells", "gap"])
def test_malformed_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = slot(tmp_path / "a", IDS, memory(KEYS, VALUES, cells=(0, 1, 5) if damage == "gap" else None))
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        raw = raw[:-5]
    elif damage == "version":
        raw[4] = 77
    elif damage == "longer":
        raw += b"xyz"
    elif damage == "cells":
        raw[28:32] = struct.pack("<I", 1 << 30)
    path.write_bytes(raw)
    assert all(isinstance(item, InputError) for item in all_of(path, site="values"))


def test_site_that_a_cache_does_not_hold_is_refused(tmp_path: Path) -> None:
    assert isinstance(error_of(slot(tmp_path / "a", IDS, memory(KEYS, VALUES)), site="final"), OptionError)
