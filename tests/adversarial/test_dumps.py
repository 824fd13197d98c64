"""A file of each producer comes back from the command line alone, and damaged ones are answered in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sipit.cli import main
from tests.adversarial.dumps import PRODUCERS, damaged_dump, scene_of_dumps
from tests.adversarial.scenes import TEXT, Scene

_N_CASES = int(os.environ.get("SIPIT_MALFORMED", 5))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of_dumps(tmp_path_factory.mktemp("scene"))


@pytest.mark.parametrize("name", PRODUCERS)
def test_good_file_comes_back(name: str, scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    producer = PRODUCERS[name]
    file = scene.folder / "dumps" / name / f"good{producer.suffix}"
    assert main(["invert", str(file), "--model", scene.model, "--no-fit", *producer.told]) == 0
    out, err = capfd.readouterr()
    assert out == (TEXT[:-1] if name == "prompt_logprobs" else TEXT)
    assert "exact     NO" not in err


@pytest.mark.skipif(os.name != "posix", reason="needs alarms")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(_N_CASES))
@pytest.mark.parametrize("name", PRODUCERS)
def test_damaged_file_is_answered_in_one_sentence(name: str, number: int, scene: Scene) -> None:
    case = damaged_dump(name, number, scene)
    assert case.fault is None, f"{case.fault}; {case.what}"


@pytest.mark.parametrize("command", ["invert", "identify", "verify"])
def test_names_in_a_file_cannot_move_the_cursor(
    command: str, scene: Scene, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = np.load(scene.folder / "dumps" / "numpy" / "good.npy")
    np.savez(tmp_path / "a.npz", **{"\x1b[31mred\n": rows, "other": rows})
    where = [] if command == "identify" else ["--layer", "2"]
    main([command, str(tmp_path / "a.npz"), "--model", scene.model, *where])
    out, err = capfd.readouterr()
    assert "red" in err + out
    assert all(line.isprintable() for line in (out + err).splitlines())
