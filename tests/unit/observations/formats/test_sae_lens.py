"""Folders of SAELens: a context a row, a hook a column; unfinished and broken ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sipit.errors import SipitError
from tests.unit.observations.formats.arrow_files import arrow_folder
from tests.unit.observations.formats.reading import all_of, dumps_of, error_of

CONTEXTS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(12).view(3, 4)


def test_contexts_are_prompts_and_the_hook_tells_the_layer(tmp_path: Path) -> None:
    found = dumps_of(arrow_folder(tmp_path / "a", CONTEXTS, IDS))
    assert [dump.layer for dump in found] == [2, 2, 2]
    for dump, rows, ids in zip(found, CONTEXTS, IDS, strict=True):
        assert torch.equal(dump.values, rows)
        assert dump.input_ids == tuple(ids.tolist())


@pytest.mark.parametrize("prompt", [0, 2])
def test_one_prompt_is_picked(tmp_path: Path, prompt: int) -> None:
    (dump,) = dumps_of(arrow_folder(tmp_path / "a", CONTEXTS, None), prompt=prompt)
    assert torch.equal(dump.values, CONTEXTS[prompt])
    assert "not there" in str(error_of(tmp_path / "a", prompt=7))


def test_output_of_a_block_is_the_next_layer(tmp_path: Path) -> None:
    path = arrow_folder(tmp_path / "a", CONTEXTS, IDS, hook="blocks.2.hook_resid_post")
    assert {dump.layer for dump in dumps_of(path)} == {3}
    assert "none is the place" in str(error_of(path, layer=2))


@pytest.mark.parametrize("damage", ["unfinished", "cut", "lacking", "state", "ids"])
def test_broken_folder_is_refused(tmp_path: Path, damage: str) -> None:
    path = arrow_folder(tmp_path / "a", CONTEXTS, IDS[:, :3] if damage == "ids" else IDS)
    first = path / "data-00000-of-00002.arrow"
    if damage == "unfinished":
        (path / "state.json").unlink()
        (path / ".tmp_shards").mkdir()
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:200])
    elif damage == "lacking":
        first.unlink()
    elif damage == "state":
        (path / "state.json").write_text('{"_data_files": 3}')
    items = all_of(path)
    assert any(isinstance(item, SipitError) for item in items)
    assert damage == "cut" or all(isinstance(item, SipitError) for item in items)
