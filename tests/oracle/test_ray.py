"""A real cluster of two workers: the results of one process, in its order, whatever becomes of a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sipit import LanguageModel
from sipit.audit import audit
from sipit.cli import main
from sipit.errors import InputError
from sipit.inversion import invert_many
from sipit.models import load
from sipit.workers import Here, OnRay

pytest.importorskip("ray")
pytestmark = [pytest.mark.thorough, pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def lm(text_folder: Path) -> LanguageModel:
    return load(text_folder)


@pytest.fixture(scope="module")
def on_ray(text_folder: Path) -> Iterator[OnRay]:
    with OnRay(partial(load, str(text_folder)), n_workers=2) as workers:
        yield workers


def _state(lm: LanguageModel, token_id: int) -> tuple[int, list[float]]:
    return os.getpid(), lm.capture(input_ids=[token_id, 3], layer=2).states[1].tolist()


def _killed_once(lm: LanguageModel, piece: tuple[Path, int]) -> int:
    mark, number = piece
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return int(lm.encode("a" * (number + 1)).sum())


def _marked(lm: LanguageModel, piece: tuple[Path, int]) -> int:
    folder, number = piece
    (folder / str(number)).touch()
    return number


def _refused(lm: LanguageModel, number: int) -> int:
    if number == 2:
        raise InputError("the third piece is no good; leave it out")
    return number


def test_two_workers_give_what_one_process_gives(on_ray: OnRay, lm: LanguageModel) -> None:
    there, here = list(on_ray.results(_state, range(9))), list(Here(lm).results(_state, range(9)))
    assert [state for _, state in there] == [state for _, state in here]
    assert len({pid for pid, _ in there}) == 2
    assert os.getpid() not in {pid for pid, _ in there}


def test_a_killed_worker_changes_nothing(on_ray: OnRay, lm: LanguageModel, tmp_path: Path) -> None:
    mark = tmp_path / "killed"
    there = list(on_ray.results(_killed_once, [(mark, n) for n in range(8)]))
    assert mark.exists()
    assert there == list(Here(lm).results(_killed_once, [(mark, n) for n in range(8)]))


def test_a_piece_that_is_refused_is_refused_in_its_turn(on_ray: OnRay) -> None:
    found = on_ray.results(_refused, range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(InputError, match="third piece"):
        next(found)


def _without_measures(trial: Any) -> dict[str, Any]:
    """What is told of a trial, but for what a process measures itself: seconds, and the price of a pass."""
    kept = {k: v for k, v in trial.record().items() if k not in ("seconds", "wall_ratio")}
    return {**kept, "shown": [(one["token"], one["is_right"]) for one in kept["shown"]]}


def test_an_audit_on_ray_is_the_audit_of_one_process(on_ray: OnRay, lm: LanguageModel, tmp_path: Path) -> None:
    prompts = [lm.encode("hello there"), lm.encode("out"), lm.encode("once more")]
    defences = ("none", "rounding:8")
    runs = [
        audit(lm, prompts, cuts=[(2, "block")], folder=tmp_path / name, defences=defences, workers=workers)
        for name, workers in (("there", on_ray), ("here", None))
    ]
    there, here = ([_without_measures(trial) for trial in trials] for _, trials in runs)
    assert there == here
    assert len(there) == 6


def test_many_inversions_on_ray_are_those_of_one_process(on_ray: OnRay, lm: LanguageModel) -> None:
    seen = [lm.capture(f"prompt number {i}", layer=2) for i in range(11)]
    there, here = list(invert_many(lm, seen, workers=on_ray)), list(invert_many(lm, seen))
    assert [(f.verdict, f.input_ids, f.text) for f in there] == [(f.verdict, f.input_ids, f.text) for f in here]
    assert all(f.verdict == "recovered" for f in there)


def test_a_survey_on_ray_is_the_survey_of_one_process(text_folder: Path, tmp_path: Path) -> None:
    records = []
    for name, more in (("there", ("--ray",)), ("here", ())):
        options = ("--folder", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json"), "--shard", "16")
        corpus = ("--prompts", "40", "--lengths", "4,6", "--layer", "1", "--layer", "3")
        command = ["collisions", "survey", "--model", str(text_folder), *options, *corpus, *more]
        done = subprocess.run([sys.executable, "-m", "sipit", *command], capture_output=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        records.append(json.loads((tmp_path / f"{name}.json").read_text()))
    layers = [[{k: v for k, v in one.items() if k != "seconds"} for one in record["layers"]] for record in records]
    assert layers[0] == layers[1]


def test_what_ray_cannot_do_is_refused(text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = tmp_path / "seen"
    assert main(["capture", "--text", "one", "--layer", "2", "--model", str(text_folder), "--out", str(seen)]) == 0
    assert main(["invert", str(seen), "--ray"]) == 2
    assert "holds one; leave it out" in capfd.readouterr().err
    assert main(["invert", "--ray", str(seen)]) == 2
    assert "name files before it" in capfd.readouterr().err
    assert torch.get_num_threads() == 1


def test_pieces_are_drawn_as_there_are_workers_for_them(on_ray: OnRay, tmp_path: Path) -> None:
    ends: list[int] = []  # how many pieces had been done when another one was drawn

    def pieces() -> Iterator[tuple[Path, int]]:
        for number in range(37):
            ends.append(len(list(tmp_path.iterdir())))
            yield tmp_path, number

    assert list(on_ray.results(_marked, pieces())) == [*range(37)]
    assert all(drawn - n_done < 2 * 2 for drawn, n_done in enumerate(ends))  # two for each of two workers
    assert list(on_ray.results(_refused, iter(()))) == []
