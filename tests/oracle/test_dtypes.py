"""States of a model run in one dtype, inverted with its weights in another: right, or a miss that names the dtype."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sipit
from sipit import LanguageModel
from sipit.cli import main
from tests.tiny_models import random_ids, tiny_model

IDS = random_ids(8, seed=3)
FAMILIES = ("llama", "gpt2", "gemma3_text")
NARROW = ("bfloat16", "float16")
TEXT = "half of it"


@torch.no_grad()
def _states(model: Any, ids: Tensor, layer: int) -> Tensor:
    """Return what the library's own pass gives, in the model's dtype. (T, D)."""
    states: Tensor = model(ids[None], output_hidden_states=True).hidden_states[layer][0]
    return states


def _in(model: nn.Module, dtype: str) -> nn.Module:
    return copy.deepcopy(model).to(getattr(torch, dtype))


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("layer", [1, 3])
def test_states_of_a_narrow_pass_need_the_weights_in_its_dtype_and_the_miss_says_so(
    family: str, narrow: str, layer: int
) -> None:
    model = tiny_model(family)
    seen = _states(_in(model, narrow), IDS, layer)
    for weights in (model, _in(_in(model, narrow), "float32")):
        found = sipit.invert(LanguageModel(weights, name=family), seen, layer=layer)
        assert found.verdict == "unmatched"
        assert found.miss is not None
        assert f"--pass-dtype {narrow}" in found.miss.diagnosis
    found = sipit.invert(LanguageModel(_in(model, narrow), name=family), seen, layer=layer)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("narrow", NARROW)
def test_states_of_a_wide_pass_come_back_with_narrow_weights(family: str, narrow: str) -> None:
    model = tiny_model(family)
    for weights in (model, _in(_in(model, narrow), "float32")):
        seen = _states(weights, IDS, 2)
        found = sipit.invert(LanguageModel(_in(model, narrow), name=family), seen, layer=2)
        assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))


def test_prompt_of_another_model_is_not_blamed_on_the_dtype_alone() -> None:
    seen = _states(_in(tiny_model("llama", seed=5), "bfloat16"), IDS, 2)
    found = sipit.invert(LanguageModel(tiny_model("llama")), seen, layer=2)
    assert found.miss is not None
    assert "this is the model" not in found.miss.diagnosis
    assert "try --pass-dtype bfloat16" in found.miss.diagnosis


def test_rows_as_wide_as_the_arithmetic_are_not_blamed_on_a_dtype() -> None:
    seen = _states(tiny_model("llama", seed=5), IDS, 2)
    found = sipit.invert(LanguageModel(tiny_model("llama")), seen, layer=2)
    assert found.miss is not None
    assert "--dtype" not in found.miss.diagnosis


@pytest.mark.thorough
@pytest.mark.parametrize("narrow", NARROW)
def test_the_command_line_names_the_dtype_and_takes_it(
    narrow: str, text_lm: LanguageModel, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = text_lm.encode(TEXT)
    torch.save(_states(_in(text_lm.model, narrow), ids, 2), tmp_path / "narrow.pt")
    torch.save(_states(text_lm.model, ids, 2), tmp_path / "wide.pt")
    told = ["--model", str(text_folder), "--layer", "2", "--no-fit"]
    assert main(["invert", str(tmp_path / "narrow.pt"), *told]) == 1
    assert f"try --pass-dtype {narrow}" in capsys.readouterr().err
    for name in ("narrow.pt", "wide.pt"):
        assert main(["invert", str(tmp_path / name), *told, "--dtype", narrow]) == 0
        assert capsys.readouterr().out == TEXT
    certificate = tmp_path / "certificate.json"
    across = ["--pass-dtype", narrow, "--json", str(certificate)]
    assert main(["invert", str(tmp_path / "narrow.pt"), *told, *across]) == 0
    assert capsys.readouterr().out == TEXT
    assert main(["check", str(certificate), str(tmp_path / "narrow.pt"), "--layer", "2"]) == 0  # loads that dtype


def test_states_under_autocast_are_recovered_and_replayed_by_the_command_line(
    text_lm: LanguageModel, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump, certificate = tmp_path / "states.pt", tmp_path / "certificate.json"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.save(_states(text_lm.model, text_lm.encode(TEXT), 2), dump)
    told = ["--model", str(text_folder), "--layer", "2"]
    assert main(["invert", str(dump), *told, "--no-fit"]) == 1
    assert "--pass-dtype" in capsys.readouterr().err
    across = ["--pass-dtype", "autocast-bfloat16", "--json", str(certificate)]
    assert main(["invert", str(dump), *told, "--no-fit", *across]) == 0
    assert capsys.readouterr().out == TEXT
    assert main(["check", str(certificate), str(dump), "--layer", "2"]) == 0  # computes so by itself
    assert main(["check", str(certificate), str(dump), "--layer", "2", "--dtype", "float32"]) == 1


def test_pass_dtype_is_refused_beside_what_it_cannot_join(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "states.pt"
    torch.save(torch.ones(3, 32), path)
    told = ["invert", str(path), "--model", str(text_folder), "--layer", "2", "--pass-dtype"]
    for more in (
        ["int3"],
        ["bfloat16", "--noise", "0.1"],
        ["bfloat16", "--noise", "auto"],
        ["float16", "--exhaustive"],
    ):
        assert main([*told, *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "dtype" in said
