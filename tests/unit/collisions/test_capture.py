"""Captured states on disk: right, resumable, nothing counted twice or lost, every damage told in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sipit import LanguageModel
from sipit.collisions import StateFolder, capture_states, last_states, survey_layers
from sipit.collisions import capture as capture_module
from sipit.errors import InputError, MismatchError, NonFiniteError, OptionError, StorageError
from sipit.observations import Cut
from tests.tiny_models import FAMILIES, N_LAYERS, random_ids, text_model, tiny_model, true_states

CUTS: list[Cut] = [Cut(1, "block"), Cut(3, "block"), Cut(3, "final")]


def prompts(n: int = 23) -> list[Tensor]:
    return [random_ids(2 + i % 5, seed=i, vocab_size=256) for i in range(n)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model()


@pytest.fixture
def folder(lm: LanguageModel, tmp_path: Path) -> Path:
    capture_states(lm, prompts(), CUTS, tmp_path / "states", shard_prompts=10)
    return tmp_path / "states"


@pytest.mark.parametrize("family", FAMILIES)
def test_last_states_are_those_of_ordinary_passes_one_by_one(family: str) -> None:
    model = tiny_model(family)
    lm = LanguageModel(model, name=family)
    cuts: list[Cut] = [Cut(1, "block"), Cut(N_LAYERS, "block"), Cut(N_LAYERS, "final")]
    given = [random_ids(2 + i % 4, seed=i) for i in range(9)]
    found = last_states(lm, given, cuts, max_tokens=8)
    for number, ids in enumerate(given):
        expected = true_states(model, family, ids)
        for rows, cut in zip(found, cuts, strict=True):
            torch.testing.assert_close(rows[number], expected[cut][-1], rtol=1e-4, atol=1e-4)


def test_folder_holds_every_prompt_and_state_once(lm: LanguageModel, folder: Path) -> None:
    kept = StateFolder(folder)
    given = prompts()
    assert [kept.prompt(i).tolist() for i in range(len(kept))] == [ids.tolist() for ids in given]
    assert kept.lengths().tolist() == [len(ids) for ids in given]
    assert [shard.n_prompts for shard in kept.shards] == [10, 10, 3]
    for cut, expected in zip(CUTS, last_states(lm, given, CUTS), strict=True):
        torch.testing.assert_close(torch.cat(kept.blocks(cut)), expected)


def test_equal_prompts_are_captured_once(lm: LanguageModel, tmp_path: Path) -> None:
    given = [*prompts(4), *prompts(6)]
    kept = capture_states(lm, given, CUTS, tmp_path / "s")
    assert [kept.prompt(i).tolist() for i in range(len(kept))] == [ids.tolist() for ids in prompts(6)]
    assert kept.manifest["source"]["n_repeats_dropped"] == 4


def _digest(folder: Path) -> dict[str, Any]:
    return {p.name: {k: v.tolist() for k, v in load_file(p).items()} for p in sorted(folder.glob("*.safetensors"))}


def test_interrupted_capture_goes_on_and_captures_nothing_twice(
    lm: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = last_states

    def stopping(model: LanguageModel, part: Any, *rest: Any, **options: Any) -> Any:
        if len(calls) == 1:
            calls.append(0)
            raise KeyboardInterrupt
        calls.append(len(part))
        return real(model, part, *rest, **options)

    monkeypatch.setattr(capture_module, "last_states", stopping)
    with pytest.raises(KeyboardInterrupt):
        capture_states(lm, prompts(), CUTS, tmp_path / "again", shard_prompts=10)
    with pytest.raises(InputError, match="10 of 23 prompts"):
        StateFolder(tmp_path / "again")
    capture_states(lm, prompts(), CUTS, tmp_path / "again", shard_prompts=10)
    assert calls == [10, 0, 10, 3]
    assert _digest(tmp_path / "again") == _digest(folder)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_lost_shard_is_named_and_only_it_is_made_anew(lm: LanguageModel, folder: Path, damage: str) -> None:
    shard = folder / "states-00001.safetensors"
    before = _digest(folder)
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises((StorageError, InputError), match=r"states-00001.*run the same capture again"):
        StateFolder(folder)
    others = {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors") if p != shard}
    capture_states(lm, prompts(), CUTS, folder, shard_prompts=10)
    assert _digest(folder) == before
    assert {p: p.stat().st_mtime_ns for p in others} == others


@pytest.mark.parametrize("change", ["prompts", "cuts", "model", "shard"])
def test_folder_of_another_capture_is_refused_untouched(lm: LanguageModel, folder: Path, change: str) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = LanguageModel(tiny_model("llama", seed=9, vocab_size=260), name="other") if change == "model" else lm
    with pytest.raises(MismatchError, match="another"):
        capture_states(
            other,
            prompts(22 if change == "prompts" else 23),
            CUTS[:2] if change == "cuts" else CUTS,
            folder,
            shard_prompts=9 if change == "shard" else 10,
        )
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 7}, "expected"),
        ({"dtype": torch.float64}, "float64"),
        ({"rows": 9}, "expected"),
        ({"drop": True}, "holds no block-1"),
    ],
)
def test_shard_of_another_shape_or_dtype_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    path = folder / "states-00001.safetensors"
    tensors = load_file(path)
    rows = tensors["block-1"]
    rows = rows[: change.get("rows", 10), : change.get("width", 32)].to(change.get("dtype", rows.dtype)).contiguous()
    if change.get("drop"):
        del tensors["block-1"]
    else:
        tensors["block-1"] = rows
    save_file(tensors, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["n_bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=words):
        StateFolder(folder).blocks(Cut(1, "block"))


def test_state_that_is_not_finite_is_refused_by_the_search(folder: Path) -> None:
    path = folder / "states-00002.safetensors"
    tensors = load_file(path)
    tensors["block-3"][1, 5] = float("nan")
    save_file(tensors, path)
    with pytest.raises(NonFiniteError, match="row 21 "):
        next(survey_layers(StateFolder(folder), cuts=[Cut(3, "block")]))


def test_overflowing_states_end_a_capture_with_the_prompt_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    lm = LanguageModel(model, name="overflowing")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"prompt 0: its state after 2 blocks"):
        capture_states(lm, [random_ids(3, seed=1)], [Cut(1, "block"), Cut(2, "block")], tmp_path / "s")
    assert not list((tmp_path / "s").glob("*.safetensors"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "sipit.states", "version": 1}', '{"format": "x"}'])
def test_damaged_manifest_is_told(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="capture"):
        StateFolder(folder)


def test_manifest_with_strange_entries_is_told(folder: Path) -> None:
    good = json.loads((folder / "manifest.json").read_text())
    for key, value in (("cuts", ["elsewhere-3"]), ("shards", [{"file": "x"}]), ("n_prompts", "23"), ("cuts", [3])):
        (folder / "manifest.json").write_text(json.dumps({**good, key: value}))
        with pytest.raises(InputError, match="damaged"):
            StateFolder(folder)


def test_full_disk_leaves_no_half_shard_and_the_capture_goes_on(
    lm: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    from sipit.collisions import store

    calls: list[int] = []
    real = save_file

    def full(tensors: Any, path: Any, **rest: Any) -> None:
        calls.append(0)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **rest)

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(StorageError, match="states-00001"):
        capture_states(lm, prompts(), CUTS, tmp_path / "again", shard_prompts=10)
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["manifest.json", "states-00000.safetensors"]
    capture_states(lm, prompts(), CUTS, tmp_path / "again", shard_prompts=10)
    assert _digest(tmp_path / "again") == _digest(folder)


def test_folder_that_cannot_be_made_or_holds_nothing_is_told(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the folder"):
        capture_states(lm, prompts(), CUTS, tmp_path / "file" / "states")
    with pytest.raises(StorageError, match="no manifest"):
        StateFolder(tmp_path)
    with pytest.raises(OptionError, match="at least one prompt"):
        capture_states(lm, [], CUTS, tmp_path / "s")


def test_layer_that_was_not_captured_is_told(folder: Path) -> None:
    with pytest.raises(OptionError, match="holds no states of layer 2"):
        StateFolder(folder).blocks(Cut(2, "block"))


def test_bfloat16_models_are_captured_in_their_dtype(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_model("llama").bfloat16(), name="half")
    kept = capture_states(lm, [random_ids(4, seed=i) for i in range(3)], [Cut(2, "block")], tmp_path / "s")
    assert kept.blocks(Cut(2, "block"))[0].dtype == torch.bfloat16
