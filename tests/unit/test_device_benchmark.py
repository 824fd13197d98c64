"""The script for a GPU runs on a CPU with a tiny shape, and says what it compared and what it left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import device

import sipit
from sipit import LanguageModel, Observation

TINY = ["--device", "cpu", "--prompts", "2", "--tokens", "4"]


def _record(folder: Path, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = device.main([*TINY, "--model", str(folder), "--out", str(out), *more])
    return code, json.loads(out.read_text("utf-8"))


@pytest.mark.thorough
def test_it_compares_answers_and_prices_every_layer_in_both_dtypes(text_folder: Path, tmp_path: Path) -> None:
    code, record = _record(text_folder, tmp_path / "record.json", "--shape", "tiny")
    cuts = ["1", "2", "3", "final"]
    assert code == 0
    assert [(one["cut"], one["same"], one["recovered"]) for one in record["same_answers"]] == [(c, 2, 2) for c in cuts]
    expected = [(dtype, cut) for dtype in ("float32", "bfloat16") for cut in cuts]
    assert [(one["dtype"], one["cut"]) for one in record["speed"]] == expected
    assert all(one["wall_ratio"] > 0 and one["n_passes"] >= 1 for one in record["speed"])
    assert all(one["exact"] == 2 for one in record["speed"] if one["dtype"] == "float32")
    assert [one["prompts"] for one in record["random_weights"]] == [2, 2]
    assert (record["left_out"], record["peak_bytes"]) == ([], None)


@pytest.mark.thorough
def test_what_has_no_room_or_no_time_is_named(text_folder: Path, tmp_path: Path) -> None:
    _, record = _record(text_folder, tmp_path / "record.json", "--prompts", "1")
    assert record["left_out"] == ["llama-8b: it takes 24 GB, and there is no memory of a GPU"]
    _, record = _record(text_folder, tmp_path / "record.json", "--seconds", "0")
    assert record["speed"] == []
    assert len(record["left_out"]) == 6


@pytest.mark.thorough
def test_another_answer_fails_it(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen_by: list[LanguageModel] = []

    def once_wrong(lm: LanguageModel, seen: Observation) -> sipit.Inversion:
        seen_by.append(lm)
        found = sipit.inversion.invert(lm, seen)
        return found if len(seen_by) != 2 else sipit.inversion.invert(lm, lm.capture("x", layer=1))

    monkeypatch.setattr(sipit, "invert", once_wrong)
    code, record = _record(text_folder, tmp_path / "record.json", "--shape", "none")
    assert code == 1
    assert record["same_answers"][0]["same"] == 1
