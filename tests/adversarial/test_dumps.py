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


@pytest.mark.parametrize("name", ["llama.cpp session", "mlx-lm", "transformers, cache"])
def test_keys_are_identified_whatever_the_order_of_their_pairs(
    name: str, scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    file = scene.folder / "dumps" / name / f"good{PRODUCERS[name].suffix}"
    assert main(["identify", str(file), "--model", scene.model, "--layer", "1", "--site", "kv"]) == 0
    fit = capfd.readouterr().out.splitlines()[1]
    assert fit.split()[1:3] == ["1", "kv"]


def _refused(scene: Scene, name: str, options: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence that options are refused with."""
    file = scene.folder / "dumps" / name / f"good{PRODUCERS[name].suffix}"
    capfd.readouterr()
    assert main(["invert", str(file), "--model", scene.model, "--no-fit", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    return err.splitlines()[-1]


# Of two arrays in an archive either may be of any layer, so each is refused for itself.
@pytest.mark.parametrize("name", [name for name in PRODUCERS if name != "numpy archive"])
def test_layer_that_is_not_there_is_refused(name: str, scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    said = _refused(scene, name, ["--layer", "99"], capfd)
    assert "layer" in said or "blocks 0 to 2, not 99" in said


_JOINED = ("vLLM", "vLLM in float8", "old speculators", "SpecForge", "SpecForge, joined layers")
_NAMELESS = ("numpy", "numpy archive", "safetensors")  # arrays of anything, so of layers too


@pytest.mark.parametrize("name", [name for name in PRODUCERS if name not in (*_JOINED, *_NAMELESS)])
def test_layers_are_refused_where_none_are_joined(name: str, scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no use for --layers" in _refused(scene, name, [*PRODUCERS[name].told, "--layers", "1,2"], capfd)


@pytest.mark.parametrize("name", [name for name in PRODUCERS if "--key" not in PRODUCERS[name].told])
def test_key_that_is_not_there_is_refused(name: str, scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    said = _refused(scene, name, [*PRODUCERS[name].told, "--key", "nothing"], capfd)
    assert "--key" in said


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
