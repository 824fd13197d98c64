"""Target caches of DeepSpec: layers from the manifest, ids and padding from each sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sipit.errors import OptionError, SipitError
from tests.unit.observations.formats.deepspec_files import target_cache
from tests.unit.observations.formats.reading import all_of, dumps_of, error_of


def _sample(seed: int, rows: int = 3) -> tuple[list[int], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 2, 4, generator=generator).bfloat16().float()
    return list(range(5, 5 + rows)), states, torch.randn(rows, 4, generator=generator).bfloat16().float()


SAMPLES = [_sample(1), _sample(2, rows=5)]


@pytest.mark.parametrize("padding", [0, 2])
def test_samples_are_read_at_each_layer(tmp_path: Path, padding: int) -> None:
    found = dumps_of(target_cache(tmp_path / "cache", SAMPLES, [-1, 7], padding=padding))
    assert [(dump.layer, dump.site) for dump in found] == [(0, "block"), (8, "block"), (None, "final")] * 2
    for dump, (ids, states, last) in zip(found[1::3], SAMPLES, strict=True):
        assert torch.equal(dump.values.float(), states[:, 1])
        assert dump.input_ids == tuple(ids)
        assert "declared 7, +1" in dump.notes[0]
        assert len(last) == len(dump.values)
    assert torch.equal(found[5].values.float(), SAMPLES[1][2])


def test_prompt_layer_and_site_pick(tmp_path: Path) -> None:
    path = target_cache(tmp_path / "cache", SAMPLES, [2, 7])
    assert [dump.layer for dump in dumps_of(path, layer=8, prompt=1)] == [8]
    assert [dump.site for dump in dumps_of(path, site="final")] == ["final", "final"]
    assert isinstance(error_of(path, layer=5), OptionError)


def test_float8_has_its_rounding(tmp_path: Path) -> None:
    found = dumps_of(target_cache(tmp_path / "cache", SAMPLES, [2, 7], dtype=torch.float8_e4m3fn), layer=3)
    assert {dump.rounded for dump in found} == {"float8_e4m3fn"}


@pytest.mark.parametrize("damage", ["version", "no layers", "dtype", "index", "shard", "cut"])
def test_malformed_cache_is_refused(tmp_path: Path, damage: str) -> None:
    changes: dict[str, Any] = {
        "version": {"version": 9},
        "no layers": {"target_layer_ids": []},
        "dtype": {"hidden_dtype": "int4"},
    }
    path = target_cache(tmp_path / "cache", SAMPLES[:1], [2, 7], **changes.get(damage, {}))
    if damage == "index":
        (path / "samples.idx").write_bytes((path / "samples.idx").read_bytes()[:-3])
    elif damage == "shard":
        raw = bytearray((path / "samples.idx").read_bytes())
        raw[8] = 9
        (path / "samples.idx").write_bytes(raw)
    elif damage == "cut":
        (path / "shard-00000.bin").write_bytes((path / "shard-00000.bin").read_bytes()[:-3])
    items = all_of(path, site="final")
    assert items
    assert all(isinstance(item, SipitError) for item in items)
