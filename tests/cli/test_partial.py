"""Rows of some positions, and some values of each row, from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sipit import LanguageModel
from sipit.cli import main
from sipit.observations import write_observation

TEXT = "hole"


def _run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


@pytest.fixture
def odd_rows(tmp_path: Path, text_lm: LanguageModel) -> Path:
    """An array of the rows at positions 1, 3, 5, … and nothing that says so."""
    np.save(tmp_path / "odd.npy", text_lm.capture(TEXT, layer=2).states[1::2].numpy())
    return tmp_path / "odd.npy"


@pytest.fixture
def top_logits(tmp_path: Path, text_lm: LanguageModel) -> Path:
    top = text_lm.capture(TEXT, site="logits").states.topk(30, dim=1)
    torch.save({"values": top.values, "indices": top.indices}, tmp_path / "top.pt")
    return tmp_path / "top.pt"


@pytest.mark.thorough
@pytest.mark.parametrize("positions", ["1:4:2", "1,3"])
def test_rows_come_back_at_the_positions_named(
    odd_rows: Path, tmp_path: Path, text_folder: Path, capfd: pytest.CaptureFixture[str], positions: str
) -> None:
    record = tmp_path / "record.json"
    told = ("--model", text_folder, "--layer", "2", "--no-fit", "--json", record)
    code, out, _ = _run(capfd, "invert", odd_rows, *told, "--positions", positions)
    assert (code, out) == (0, TEXT)
    held = [position["is_held"] for position in json.loads(record.read_text())["positions"]]
    assert held == [False, True] * 2
    assert _run(capfd, "check", record, odd_rows)[0] == 0


def test_positions_are_counted_from_the_start_of_the_prompt_behind_a_known_prefix(
    odd_rows: Path, text_folder: Path, text_lm: LanguageModel, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(odd_rows, text_lm.capture("known hole", layer=2).states[7::2].numpy())
    told = ("--model", text_folder, "--layer", "2", "--no-fit", "--prefix-text", "known ")
    code, out, _ = _run(capfd, "invert", odd_rows, *told, "--positions", "7:10:2")
    assert (code, out) == (0, TEXT)


@pytest.mark.thorough
def test_own_file_is_placed_too(
    tmp_path: Path, text_folder: Path, text_lm: LanguageModel, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = text_lm.capture(TEXT, layer=2)
    write_observation(replace(seen, states=seen.states[[0, 1, 3]], positions=()), tmp_path / "own")
    code, out, _ = _run(capfd, "invert", tmp_path / "own", "--model", text_folder, "--positions", "0,1,3")
    assert (code, out) == (0, TEXT)


@pytest.mark.parametrize(
    ("positions", "sentence"),
    [
        ("1,3,4", "names 3 positions, the file holds 2 rows"),
        ("3,1", "rise"),
        ("1,1", "rise"),
        ("-1,1", "rise"),
        ("1,3,x", "whole numbers"),
        ("1:4:0", "no range"),
        ("1:4:-2", "no range"),
        ("6:1", "names 0 positions"),
        ("1:2:3:4", "no range"),
        ("1:,4", "no range"),
        (":", "no range"),
        ("", "names 0 positions"),
        ("0:1000000000000", "names 1000000000000 positions"),
        ("1:1000:2,3", "no range"),
    ],
)
def test_positions_that_cannot_be_are_refused(
    odd_rows: Path, text_folder: Path, capfd: pytest.CaptureFixture[str], positions: str, sentence: str
) -> None:
    told = ("--model", text_folder, "--layer", "2", f"--positions={positions}")
    code, out, err = _run(capfd, "invert", odd_rows, *told)
    assert (code, out) == (2, "")
    assert sentence in err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--noise", "auto"), "no row is held at position 0"),
        (("--shuffled",), "one is held of every position"),
        (("--permuted",), "one is held of every position"),
        (("--policy", "likely"), "use policy 'auto'"),
    ],
)
def test_what_needs_every_row_refuses_holes(
    odd_rows: Path,
    text_folder: Path,
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    sentence: str,
) -> None:
    told = ("--model", text_folder, "--layer", "2", "--positions", "1:4:2")
    code, out, err = _run(capfd, "invert", odd_rows, *told, *options)
    assert (code, out) == (2, "")
    assert sentence in err


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--noise", "auto"), "only some of the 260 values are held"),
        (("--shuffled",), "cannot be put in order"),
        (("--permuted",), "cannot be put in order"),
    ],
)
def test_what_needs_whole_rows_refuses_the_largest_logits(
    top_logits: Path,
    text_folder: Path,
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    sentence: str,
) -> None:
    told = ("invert", top_logits, "--model", text_folder, "--no-fit")
    assert _run(capfd, *told)[:2] == (0, TEXT)
    code, out, err = _run(capfd, *told, *options)
    assert (code, out) == (2, "")
    assert sentence in err


@pytest.mark.thorough
def test_largest_logits_of_some_positions_come_back(
    top_logits: Path, text_lm: LanguageModel, text_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    top = text_lm.capture(TEXT, site="logits").states[1::2].topk(30, dim=1)
    torch.save({"values": top.values, "indices": top.indices}, top_logits)
    told = ("invert", top_logits, "--model", text_folder, "--no-fit", "--positions", "1:4:2")
    assert _run(capfd, *told)[:2] == (0, TEXT)
