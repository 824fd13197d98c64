"""Every bad input: one sentence on standard error, exit code 2, nothing on standard output, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import sipit
from sipit import LanguageModel, Observation
from sipit.cli import main
from sipit.observations import file as observation_file
from tests.tiny_models import tiny_model

Refused = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_lm: LanguageModel) -> Path:
    """A working folder that holds one good observation."""
    monkeypatch.chdir(tmp_path)
    sipit.write_observation(text_lm.capture("good", layer=1), tmp_path / "good")
    return tmp_path


@pytest.fixture
def refused(here: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused; return its sentence."""

    def run(*arguments: str | Path) -> str:
        before = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert code == 2
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("sipit: ")
        assert "Traceback" not in err
        assert len(lines[0]) < 700
        assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == before  # nothing new, nothing half-written
        return lines[0]

    return run


def _states(name: str, states: torch.Tensor, **metadata: str) -> str:
    known = {"format": "sipit.observation", "version": "1", "site": "block", "layer": "1"}
    positions = json.dumps(list(range(states.shape[0])))
    save_file({"states": states}, name, metadata={**known, "positions": positions, **metadata})
    return name


# Bad usage


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["invert"],
        ["invert", "good", "--nonsense"],
        ["invert", "good", "--policy", "nonsense"],
        ["invert", "good", "--max-batch", "many"],
        ["invert", "good", "--noise", "loud"],
        ["capture", "--layer", "1", "--out", "x"],
        ["capture", "--text", "a", "--ids", "1", "--layer", "1", "--out", "x"],
        ["capture", "--text", "a", "--layer", "1"],
        ["capture", "--text", "a", "--layer", "one", "--out", "x"],
        ["capture", "--text", "a", "--layer", "1", "--store-dtype", "int8", "--out", "x"],
        ["check", "only-one"],
    ],
)
def test_bad_usage_is_refused_with_the_way_to_help(refused: Refused, arguments: list[str]) -> None:
    assert "--help" in refused(*arguments)


# Observation files


def test_missing_file_is_refused(refused: Refused) -> None:
    assert "absent" in refused("invert", "absent")


def test_folder_in_place_of_a_file_is_refused(refused: Refused, here: Path) -> None:
    refused("invert", here)


def test_empty_file_is_refused(refused: Refused, here: Path) -> None:
    (here / "x").touch()
    assert "not a whole safetensors file" in refused("invert", "x")


def test_truncated_file_is_refused(refused: Refused, here: Path) -> None:
    (here / "x").write_bytes((here / "good").read_bytes()[:-5])
    assert "not a whole safetensors file" in refused("invert", "x")


def test_text_file_is_refused(refused: Refused, here: Path) -> None:
    (here / "x").write_text("I am not a tensor, and I am long enough to have a header.")
    refused("invert", "x")


def test_other_safetensors_file_is_refused(refused: Refused, text_folder: Path) -> None:
    sentence = refused("invert", text_folder / "model.safetensors")
    assert "lm_head.weight does not say after how many blocks" in sentence
    assert "say --layer" in sentence


def test_unknown_metadata_is_refused(refused: Refused) -> None:
    assert "note" in refused("invert", _states("x", torch.ones(2, 32), note="!"))


def test_newer_format_is_refused(refused: Refused) -> None:
    assert "version" in refused("invert", _states("x", torch.ones(2, 32), version="2"))


def test_positions_at_infinity_are_refused(refused: Refused) -> None:
    refused("invert", _states("x", torch.ones(2, 32), positions="[0, Infinity]"))


def test_nan_is_refused(refused: Refused) -> None:
    assert "NaN" in refused("invert", _states("x", torch.full((2, 32), float("nan"))))


def test_infinity_is_refused(refused: Refused) -> None:
    assert "infinity" in refused("invert", _states("x", torch.full((2, 32), float("inf"))))


def test_empty_states_are_refused(refused: Refused) -> None:
    assert "empty" in refused("invert", _states("x", torch.ones(0, 32)))


def test_wrong_width_is_refused(refused: Refused, text_folder: Path) -> None:
    sentence = refused("invert", _states("x", torch.ones(2, 31)), "--model", text_folder)
    assert "31" in sentence
    assert "32" in sentence


def test_layer_the_model_lacks_is_refused(refused: Refused, text_folder: Path) -> None:
    assert "layer 77" in refused("invert", _states("x", torch.ones(2, 32), layer="77"), "--model", text_folder)


def test_site_the_model_lacks_is_refused(refused: Refused, text_folder: Path) -> None:
    assert "nonsense" in refused("invert", _states("x", torch.ones(2, 32), site="nonsense"), "--model", text_folder)


@pytest.mark.parametrize("site", ["kv", "logits"])
def test_width_that_the_site_lacks_is_refused(refused: Refused, text_folder: Path, site: str) -> None:
    sentence = refused("invert", _states("x", torch.ones(2, 31), site=site, layer="4"), "--model", text_folder)
    assert site in sentence


def test_states_whose_positions_fall_are_refused(refused: Refused, text_folder: Path) -> None:
    name = _states("x", torch.ones(2, 32), positions="[2, 0]")
    assert "position" in refused("invert", name, "--model", text_folder)


def test_states_of_another_model_are_refused(refused: Refused, ids_folder: Path) -> None:
    assert "fingerprint" in refused("invert", "good", "--model", ids_folder)


def test_file_that_names_no_model_is_refused(refused: Refused) -> None:
    assert "--model" in refused("invert", _states("x", torch.ones(2, 32)))


# Prompts


def test_empty_prompt_is_refused(refused: Refused, text_folder: Path) -> None:
    assert "empty" in refused("capture", "--text", "", "--layer", "1", "--out", "x", "--model", text_folder)


def test_empty_list_of_ids_is_refused(refused: Refused, text_folder: Path) -> None:
    assert "empty" in refused("capture", "--ids", "", "--layer", "1", "--out", "x", "--model", text_folder)


def test_id_outside_the_vocabulary_is_refused(refused: Refused, text_folder: Path) -> None:
    assert "260" in refused("capture", "--ids", "1,260", "--layer", "1", "--out", "x", "--model", text_folder)


def test_ids_that_are_no_numbers_are_refused(refused: Refused, text_folder: Path) -> None:
    assert "--ids" in refused("capture", "--ids", "1;2", "--layer", "1", "--out", "x", "--model", text_folder)


def test_id_beyond_every_integer_is_refused(refused: Refused, text_folder: Path) -> None:
    refused("capture", "--ids", "9" * 30, "--layer", "1", "--out", "x", "--model", text_folder)


def test_missing_text_file_is_refused(refused: Refused, text_folder: Path) -> None:
    refused("capture", "--text-file", "absent", "--layer", "1", "--out", "x", "--model", text_folder)


def test_text_file_in_another_encoding_is_refused(refused: Refused, here: Path, text_folder: Path) -> None:
    (here / "latin").write_bytes("naïve".encode("latin-1"))
    assert "UTF-8" in refused("capture", "--text-file", "latin", "--layer", "1", "--out", "x", "--model", text_folder)


def test_argument_that_is_not_utf8_is_refused(refused: Refused, text_folder: Path) -> None:
    """Bytes of the command line that are not UTF-8 arrive as lone surrogates."""
    refused("capture", "--text", "na\udcefve", "--layer", "1", "--out", "x", "--model", text_folder)


def test_text_for_a_model_without_a_tokenizer_is_refused(refused: Refused, ids_folder: Path) -> None:
    assert "tokenizer" in refused("capture", "--text", "a", "--layer", "1", "--out", "x", "--model", ids_folder)


def test_chat_without_a_template_is_refused(refused: Refused, ids_folder: Path) -> None:
    refused("capture", "--text", "a", "--chat", "--layer", "1", "--out", "x", "--model", ids_folder)


def test_chat_with_ids_is_refused(refused: Refused, text_folder: Path) -> None:
    refused("capture", "--ids", "1,2", "--chat", "--layer", "1", "--out", "x", "--model", text_folder)


def test_missing_layer_is_refused(refused: Refused, text_folder: Path) -> None:
    assert "layer" in refused("capture", "--text", "a", "--out", "x", "--model", text_folder)


@pytest.mark.parametrize("layer", ["-1", "4", "1000000"])
def test_layer_out_of_range_is_refused(refused: Refused, text_folder: Path, layer: str) -> None:
    refused("capture", "--text", "a", f"--layer={layer}", "--out", "x", "--model", text_folder)


def test_prompt_beyond_the_position_table_is_refused(refused: Refused, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("short")
    tiny_model("gpt2", n_positions=128, max_position_embeddings=128).save_pretrained(folder)
    ids = ",".join(["1"] * 129)
    assert "128" in refused("capture", "--ids", ids, "--layer", "1", "--out", "x", "--model", folder)


# Options


@pytest.mark.parametrize(
    "option", ["--noise=-1", "--noise=nan", "--noise=inf", "--max-batch=0", "--device=nonsense", "--dtype=int8"]
)
def test_option_out_of_range_is_refused(refused: Refused, text_folder: Path, option: str) -> None:
    refused("invert", "good", "--model", text_folder, option)


# Models


def test_missing_model_folder_is_refused(refused: Refused, here: Path) -> None:
    assert "no such folder" in refused("invert", "good", "--model", here / "absent")


def test_folder_that_is_no_model_is_refused(refused: Refused, here: Path) -> None:
    (here / "empty").mkdir()
    refused("invert", "good", "--model", here / "empty")


def test_unreachable_hub_id_is_refused(refused: Refused) -> None:
    refused("invert", "good", "--model", "no-such-owner/no-such-model")


def test_pinned_model_without_network_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("SIPIT_CACHE", str(here / "cache"))

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host\n")

    monkeypatch.setattr("sipit.models.pinned.subprocess.run", run)
    assert main(["invert", "good", "--model", "smollm2-135m"]) == 2
    out, err = capfd.readouterr()
    notice, sentence = err.splitlines()  # what is being fetched under which licence, and why it was not
    assert out == ""
    assert "Apache-2.0" in notice
    assert "no route to host" in sentence
    assert "PIP_FIND_LINKS" in sentence
    assert list((here / "cache" / "models").iterdir()) == []


def test_pinned_model_with_a_full_cache_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("SIPIT_CACHE", str(here / "cache"))

    def run(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sipit.models.pinned.subprocess.run", run)
    assert main(["invert", "good", "--model", "smollm2-135m"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "No space left" in err.splitlines()[-1]
    assert "SIPIT_CACHE" in err.splitlines()[-1]
    assert list((here / "cache" / "models").iterdir()) == []


# Outputs


@pytest.mark.parametrize("target", ["absent/x", ".", "folder", "good/x", "/"])
def test_observation_that_cannot_be_written_is_refused_before_the_model_loads(
    refused: Refused, here: Path, target: str
) -> None:
    (here / "folder").mkdir()
    sentence = refused("capture", "--text", "a", "--layer", "1", "--out", target, "--model", here / "absent")
    assert "cannot write" in sentence


@pytest.mark.parametrize("target", ["absent/x", ".", "folder", "good/x"])
def test_certificate_that_cannot_be_written_is_refused_before_the_model_loads(
    refused: Refused, here: Path, target: str
) -> None:
    (here / "folder").mkdir()
    assert "cannot write" in refused("invert", "good", "--json", target, "--model", here / "absent")


def test_full_disk_leaves_no_observation(
    refused: Refused, here: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(observation_file, "save_file", full)
    sentence = refused("capture", "--text", "a", "--layer", "1", "--out", "x", "--model", text_folder)
    assert "No space left" in sentence


# Certificates


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "sipit.certificate"}', "[" * 100_000])
def test_malformed_certificate_is_refused(refused: Refused, here: Path, content: str) -> None:
    (here / "c.json").write_text(content)
    refused("check", "c.json", "good")


def test_missing_certificate_is_refused(refused: Refused) -> None:
    refused("check", "absent.json", "good")


def test_observation_in_place_of_a_certificate_is_refused(refused: Refused) -> None:
    refused("check", "good", "good")


def test_good_input_is_not_refused(here: Path, text_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The counter-example: what all the above is a deviation from."""
    assert main(["invert", "good", "--model", str(text_folder)]) == 0
    assert capfd.readouterr().out == "good"
    assert isinstance(sipit.read_observation("good"), Observation)
