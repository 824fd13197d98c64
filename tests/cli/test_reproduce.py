"""`sipit reproduce` and `sipit report`: every experiment runs, goes on, and is judged by its numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sipit
from sipit import LanguageModel
from sipit.baselines.hard_prompts import hard_prompts
from sipit.cli import main
from sipit.experiments.catalogue import EXPERIMENTS
from sipit.experiments.dimension import intrinsic_dimension
from sipit.report.reproduction import reproduction_page

pytestmark = pytest.mark.xdist_group("reproduce")  # one worker makes the records that they share


@pytest.fixture(scope="module")
def results(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all experiments say of a tiny model."""
    out = tmp_path_factory.mktemp("results")
    assert main(["reproduce", "all", "--scale", "smoke", "--model", str(text_folder), "--out", str(out)]) == 0
    return out


def _records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.thorough
def test_each_experiment_leaves_records_that_say_what_made_them(name: str, results: Path) -> None:
    records = _records(results, name)
    assert records
    for record in records:
        assert record["experiment"] == name
        assert {"fingerprint", "command", "seconds", "scale", "seed", "torch", "threads", "key"} <= set(record)
        assert "refused" not in record["values"]


@pytest.mark.thorough
def test_distances_are_those_of_ordinary_passes(results: Path, text_folder: Path) -> None:
    lm = sipit.load(str(text_folder))
    records = [r["values"] for r in _records(results, "distances")]
    record = next(values for values in records if (values["layer"], values["site"]) == (1, "block"))
    ids = [lm.encode(text) for text in record["closest_varied_texts"]]
    states = [lm.capture(input_ids=each, layer=1).states[-1].double() for each in ids]
    assert float((states[0] - states[1]).norm()) == pytest.approx(record["least_varied"], rel=1e-3)
    assert record["n_pairs"] == record["n_prompts"] * (record["n_prompts"] - 1) // 2
    assert record["n_collisions"] == 0


def test_points_of_five_directions_have_about_five_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 5, generator=generator) @ torch.randn(5, 60, generator=generator)
    found = intrinsic_dimension(points.double())
    assert found is not None
    assert all(4.5 < value < 5.5 for value in found.values())


@pytest.mark.thorough
def test_half_the_margin_is_where_the_worst_noise_turns_the_token(results: Path) -> None:
    by_factor = {r["values"]["factor"]: r["values"]["worst_is_right"] for r in _records(results, "half-margin")}
    assert by_factor == {0.5: True, 0.9: True, 1.1: False, 2.0: False}


@pytest.mark.thorough
def test_one_repeated_token_collides_under_rotary_positions_alone(results: Path) -> None:
    found = {r["key"]: r["values"] for r in _records(results, "repeated-token")}
    assert found["llama"]["largest_gap"] < 1e-12 < 1e-6 < found["gpt2"]["largest_gap"]
    assert found["llama"]["least_gap_behind_another_token"] > 1e-6


@pytest.mark.thorough
def test_ours_is_exact_beside_the_baselines(results: Path) -> None:
    runs = [r["values"] for r in _records(results, "inversion")]
    assert {run["method"] for run in runs} >= {
        "auto",
        "random",
        "reference-sipit",
        "vocabulary-matching",
        "hard-prompts",
    }
    assert all(run["exact"] for run in runs if run["method"] in ("auto", "vocabulary-matching"))


@pytest.mark.thorough
def test_inversions_say_whether_a_fit_helped(results: Path) -> None:
    said = [r["values"] for name in ("long-prompts", "inversion") for r in _records(results, name)]
    assert {v["is_fitted"] for v in said if v.get("method") != "hard-prompts"} == {False}


@pytest.mark.thorough
def test_a_second_run_makes_nothing_anew(results: Path, text_folder: Path) -> None:
    before = {path: path.read_bytes() for path in results.glob("*.jsonl")}
    assert main(["reproduce", "margins", "--scale", "smoke", "--model", str(text_folder), "--out", str(results)]) == 0
    assert {path: path.read_bytes() for path in results.glob("*.jsonl")} == before
    path = results / "margins.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert main(["reproduce", "margins", "--scale", "smoke", "--model", str(text_folder), "--out", str(results)]) == 0
    again = path.read_bytes().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["values"] == json.loads(lines[-1])["values"]


@pytest.mark.thorough
def test_the_page_says_of_each_claim_whether_it_held(results: Path, tmp_path: Path) -> None:
    assert main(["report", str(results), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text("utf-8")
    assert all(f'id="{name}"' in text for name in EXPERIMENTS)
    assert "not tested here" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert len(text) < 3 << 20
    inside = re.search(r'<script type="application/json" id="record">(.*?)</script>', text, re.S)
    assert inside is not None
    assert len(json.loads(inside[1])) == sum(len(_records(results, name)) for name in EXPERIMENTS)


def test_a_claim_that_does_not_hold_is_said_not_to() -> None:
    head = {"experiment": "half-margin", "model": "m", "fingerprint": "f", "dtype": "d", "device": "c", "threads": 1}
    head |= {"torch": "2", "scale": "smoke", "seconds": 1.0, "command": "c"}
    values = [{"factor": f, "worst_is_right": True, "random_right": 1.0} for f in (0.5, 2.0)]
    text = reproduction_page([{**head, "key": str(v["factor"]), "values": v} for v in values], EXPERIMENTS)
    row = re.search(r"Theorem 3.2</a>.*?</tr>", text)
    assert row is not None
    assert "did not hold" in row[0]
    assert text.count('class="open">not tested here</td>') == len(EXPERIMENTS) - 1


def test_hard_prompts_lower_their_loss_and_claim_nothing(text_lm: LanguageModel) -> None:
    seen = text_lm.capture("abcd", layer=1)
    short, long = (hard_prompts(text_lm, seen, n_steps=n, seed=1) for n in (1, 60))
    assert long.loss < short.loss
    states = text_lm.capture(input_ids=torch.tensor(long.input_ids), layer=1).states
    assert float((states - seen.states).square().mean()) == pytest.approx(long.loss, rel=1e-3)
    assert hard_prompts(text_lm, seen, max_seconds=0.0).n_steps == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["reproduce"], "--list"),
        (["reproduce", "nonsense"], "unknown"),
        (["report", "nowhere", "--out", "x"], "no folder"),
        (["report", ".", "--out", "x"], "no record"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert reason in capsys.readouterr().err


def test_the_list_names_each_with_what_it_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{one.name} " in out and one.answers in out for one in EXPERIMENTS.values())
