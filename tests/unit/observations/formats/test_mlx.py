"""Prompt caches of mlx-lm: keys and values of each block; what rotates or is quantised is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sipit.errors import SipitError
from tests.unit.observations.formats.reading import all_of, dumps_of, error_of


def written(path: Path, blocks: list[tuple[Tensor, Tensor]], kind: str = "KVCache") -> Path:
    """A cache as mlx-lm's save_prompt_cache lays it out: (1, heads, T, width) each."""
    tensors = {f"{i}.{n}": part for i, block in enumerate(blocks) for n, part in enumerate(block)}
    metadata = {"1.model": "m", "1.tokenizer_config": "{}", **{f"2.{i}": kind for i in range(len(blocks))}}
    save_file(tensors, path, metadata=metadata)
    return path


def _block(seed: int, rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 2, rows, 4, generator=generator).to(dtype) for _ in range(2))
    return keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_are_read_by_position(tmp_path: Path, dtype: torch.dtype) -> None:
    blocks = [_block(1, dtype=dtype), _block(2, dtype=dtype)]
    path = written(tmp_path / "a.safetensors", blocks)
    found = dumps_of(path)
    assert [(dump.layer, dump.site) for dump in found] == [(0, "kv"), (1, "kv")]
    keys, values = (part[0].transpose(0, 1).reshape(5, 8) for part in blocks[1])
    assert torch.equal(found[1].values, torch.cat([keys, values], dim=1))
    assert torch.equal(dumps_of(path, layer=1, site="keys")[0].values, keys)
    assert torch.equal(dumps_of(path, layer=1, site="values")[0].values, values)


def test_room_that_was_not_used_is_cut(tmp_path: Path) -> None:
    keys, values = _block(1)
    block = (torch.cat([keys, torch.zeros(1, 2, 3, 4)], dim=2), torch.cat([values, torch.zeros(1, 2, 3, 4)], dim=2))
    (dump,) = dumps_of(written(tmp_path / "a.safetensors", [block]))
    assert len(dump.values) == 5
    assert "3 rows of zeros" in " ".join(dump.notes)


@pytest.mark.parametrize("used", [5, 3])
def test_layout_of_2026_says_how_much_of_the_room_is_used(tmp_path: Path, used: int) -> None:
    keys, values = _block(1)
    scalar = {"2.0": "", "2.1.0": "0.2", "2.1.1": "scalar"}
    tensors = {"0.0": keys, "0.1": values, "0.2": torch.tensor(used, dtype=torch.int32)}
    save_file(tensors, tmp_path / "a", metadata={"0.model": "m", "1.0": "KVCache", **scalar})
    (dump,) = dumps_of(tmp_path / "a", site="keys")
    assert torch.equal(dump.values, keys[0].transpose(0, 1).reshape(5, 8)[:used])
    save_file({**tensors, "0.2": torch.tensor(9)}, tmp_path / "a", metadata={"1.0": "KVCache", **scalar})
    assert "another number of rows" in str(error_of(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["RotatingKVCache", "QuantizedKVCache", "MambaCache"])
def test_other_caches_are_refused(tmp_path: Path, kind: str) -> None:
    assert kind in str(error_of(written(tmp_path / "a.safetensors", [_block(1)], kind)))


@pytest.mark.parametrize(
    "blocks",
    [
        [(torch.ones(2, 2, 5, 4), torch.ones(2, 2, 5, 4))],
        [(torch.ones(2, 5, 4), torch.ones(2, 5, 4))],
        [(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 4, 4))],
        [(torch.ones(1, 2, 5, 4).int(), torch.ones(1, 2, 5, 4).int())],
        [(torch.full((1, 2, 5, 4), float("nan")), torch.ones(1, 2, 5, 4))],
    ],
)
def test_malformed_cache_is_refused(tmp_path: Path, blocks: list[tuple[Tensor, Tensor]]) -> None:
    items = all_of(written(tmp_path / "a.safetensors", blocks))
    assert items
    assert all(isinstance(item, SipitError) for item in items)


def test_site_that_a_cache_does_not_hold_is_refused(tmp_path: Path) -> None:
    assert "--site kv" in str(error_of(written(tmp_path / "a.safetensors", [_block(1)]), site="final"))
