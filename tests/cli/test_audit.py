"""`sipit audit` from the command line: the record, the page, the gate, dumps, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sipit
from sipit.audit import DEFENCES as KNOWN
from sipit.cli import main
from sipit.cli.audit import DEFENCES
from sipit.observations import write_observation

KEYS = {
    *("layer", "site", "dtype", "defence", "strength", "prompts", "exact_prompts", "tokens", "exact_tokens"),
    *("low", "high", "wall_ratio", "kl", "agreement"),
}


def _audit(folder: Path, out: Path, *more: str) -> int:
    return main(["audit", "--model", str(folder), "--out", str(out), *more])


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("hello out there\n\nmy secret\n", "utf-8")
    return str(path)


def test_bare_states_fail_the_gate_and_drowned_ones_pass(text_folder: Path, text: str, tmp_path: Path) -> None:
    more = ("--layer", "2", "--text", text, "--json", str(tmp_path / "copy.json"))
    assert _audit(text_folder, tmp_path / "out", *more) == 1
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == record
    (cell,) = record["cells"]
    assert set(cell) >= KEYS
    assert (cell["prompts"], cell["exact_prompts"], cell["defence"]) == (2, 2, "none")
    assert (record["given_away"], record["fail_above"]) == (1.0, 0.0)
    page = (tmp_path / "out" / "audit.html").read_text("utf-8")
    assert page.count('class="token"') == len("hello out there")
    assert _audit(text_folder, tmp_path / "out", *more, "--fail-above", "1") == 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("more", "cuts"),
    [
        (("--layer", "final"), ["final 3"]),
        (("--layer", "final", "--layer", "1", "--layer", "1"), ["block 1", "final 3"]),
        (("--site", "logits", "--site", "values", "--layer", "2"), ["logits 3", "values 2"]),
    ],
)
def test_layers_and_sites_name_the_cells(
    more: tuple[str, ...], cuts: list[str], text_folder: Path, text: str, tmp_path: Path
) -> None:
    _audit(text_folder, tmp_path / "out", "--text", text, *more)
    cells = json.loads((tmp_path / "out" / "audit.json").read_text())["cells"]
    assert [f"{cell['site']} {cell['layer']}" for cell in cells] == cuts


@pytest.mark.thorough
def test_an_audit_goes_on_where_it_was(text_folder: Path, text: str, tmp_path: Path) -> None:
    more = ("--layer", "2", "--text", text)
    _audit(text_folder, tmp_path / "out", *more)
    log = (tmp_path / "out" / "trials.jsonl").read_text()
    _audit(text_folder, tmp_path / "out", *more, "--defence", "permute-columns", "--defence", "clipping:3")
    longer = (tmp_path / "out" / "trials.jsonl").read_text()
    assert longer.startswith(log)
    cells = json.loads((tmp_path / "out" / "audit.json").read_text())["cells"]
    assert [cell["defence"] for cell in cells] == ["none", "permute-columns", "clipping"]
    assert cells[1]["exact_prompts"] == 2
    assert cells[1]["agreement"] == 1.0  # whoever has the key undoes it


@pytest.mark.thorough
def test_a_redacted_page_holds_no_prompt(text_folder: Path, text: str, tmp_path: Path) -> None:
    _audit(text_folder, tmp_path / "out", "--layer", "2", "--text", text, "--redact")
    page = (tmp_path / "out" / "audit.html").read_text("utf-8")
    assert 'class="token' not in page.split("</style>")[1]


def test_dumps_are_audited_and_a_broken_one_stops_nothing(text_folder: Path, tmp_path: Path) -> None:
    lm = sipit.load(str(text_folder))
    write_observation(lm.capture("one of ours", layer=2), tmp_path / "own")
    np.save(tmp_path / "two.npy", lm.capture("another tool", layer=2).states.numpy())
    np.save(tmp_path / "noise.npy", torch.randn(4, lm.d_model).numpy())
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY broken")
    files = [str(tmp_path / name) for name in ("own", "two.npy", "noise.npy", "broken.npy")]
    assert _audit(text_folder, tmp_path / "out", *files, "--layer", "2") == 1
    (cell,) = json.loads((tmp_path / "out" / "audit.json").read_text())["cells"]
    assert (cell["prompts"], cell["exact_prompts"], cell["verdicts"]) == (3, 2, {"recovered": 2, "unmatched": 1})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "say --layer"),
        (("--site", "kv", "--site", "final"), "say --layer"),
        (("--layer", "final", "--site", "block"), "'block' needs the number"),
        (("--layer", "2", "--site", "final"), "leave --layer 2 out"),
        (("--layer", "2", "--fail-above", "2"), "share"),
        (("--layer", "2", "--defence", "magic:1"), "unknown"),
        (("--layer", "2", "--defence", "gaussian"), "strength"),
        (("--layer", "99"), "layer"),
        (("--layer", "2", "--text", "nowhere.txt"), "no file"),
        (("dump.npy", "--defence", "gaussian:1"), "leave one of them out"),
        (("--layer", "2", "--prompts", "0"), "from 1"),
        (("--layer", "2", "--dtype", "float99"), "unknown"),
    ],
)
def test_what_cannot_be_audited_is_refused(
    more: tuple[str, ...], reason: str, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _audit(text_folder, tmp_path / "out", *more) == 2
    assert reason in capsys.readouterr().err


def test_every_defence_is_named_by_the_help_and_explained_in_the_docs() -> None:
    assert set(DEFENCES) == set(KNOWN)
    rows = (Path(__file__).parents[2] / "docs" / "defences.md").read_text("utf-8").splitlines()
    assert {row.split("`")[1] for row in rows if row.startswith("| `") and row[3:7] != "NAME"} == set(KNOWN)
