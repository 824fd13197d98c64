"""Quantised weights: codes and scales are what the fingerprint sees, states are those of one prompt alone."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sipit
from sipit import LanguageModel
from sipit.cli import main
from sipit.collisions import in_float64, last_states, survey_margins
from sipit.collisions.precision import PRECISIONS, Precision, float64_distances, precision_survey, with_rounded_weights
from sipit.errors import ModelError, OptionError
from sipit.models.fingerprint import fingerprint
from sipit.models.quantized import QUANTIZERS, is_quantized, quantizer_of
from sipit.observations import Cut
from tests.tiny_models import random_ids, tiny_model

FOUR_BIT = ("nf4", "fp4")
CUTS = [Cut(1, "block"), Cut(4, "block"), Cut(4, "final")]
PROMPTS = [random_ids(6, seed=seed) for seed in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of widths that every quantiser's blocks of 64 divide, with outliers in its activations."""
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", seed=3, hidden_size=64, intermediate_size=128)
    model.model.layers[1].input_layernorm.weight.data[:2] = 6.0
    path = tmp_path_factory.mktemp("plain")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=QUANTIZERS)
def quantized(request: pytest.FixtureRequest, folder: Path) -> tuple[str, LanguageModel]:
    return request.param, sipit.load(folder, quantize=request.param, device="cpu")


@torch.no_grad()
def _library_states(folder: Path, quantize: str, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the states of the library's own model, as it was loaded but for the bfloat16 layout."""
    from transformers import BitsAndBytesConfig

    options: Any = (
        {"load_in_8bit": True, "llm_int8_threshold": 6.0 if quantize == "int8" else 0.0}
        if quantize.startswith("int8")
        else {"load_in_4bit": True, "bnb_4bit_quant_type": quantize}
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    hidden: torch.Tensor = model.eval()(input_ids=ids[None], output_hidden_states=True).hidden_states[layer][0]
    return hidden


def test_states_are_those_of_the_librarys_own_model(quantized: tuple[str, LanguageModel], folder: Path) -> None:
    quantize, lm = quantized
    assert quantizer_of(lm.model) == quantize
    states = lm.capture(input_ids=PROMPTS[0], layer=2).states
    assert torch.equal(states, _library_states(folder, quantize, PROMPTS[0], 2))
    plain = sipit.load(folder).capture(input_ids=PROMPTS[0], layer=2).states
    assert 1e-4 < float((states - plain).norm() / plain.norm()) < 0.7


def test_fingerprint_tells_quantisers_apart_and_sees_the_scales(folder: Path) -> None:
    models = {name: sipit.load(folder, quantize=name) for name in (None, *QUANTIZERS)}
    assert len({lm.fingerprint for lm in models.values()}) == len(models)
    for name in ("int8", "nf4"):
        lm = models[name]
        assert fingerprint(lm.model) == lm.fingerprint == sipit.load(folder, quantize=name).fingerprint
        damaged: Any = copy.deepcopy(lm.model)
        module = damaged.model.layers[3].mlp.down_proj
        (module.state.SCB if name == "int8" else module.weight.quant_state.absmax)[0] *= 1.5
        assert fingerprint(damaged) != lm.fingerprint


def test_fingerprint_leaves_the_states_alone(quantized: tuple[str, LanguageModel]) -> None:
    _, lm = quantized
    before = lm.capture(input_ids=PROMPTS[1], layer=3).states
    fingerprint(lm.model)
    assert torch.equal(before, lm.capture(input_ids=PROMPTS[1], layer=3).states)


def test_a_folder_of_quantised_weights_loads_as_such(
    quantized: tuple[str, LanguageModel], folder: Path, tmp_path: Path
) -> None:
    quantize, lm = quantized
    sipit.load(folder, quantize=quantize).model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text("utf-8"))
    stored = sipit.load(tmp_path, device="cpu")
    assert is_quantized(stored.model)
    assert stored.capture(input_ids=PROMPTS[2], layer=4).digest() == lm.capture(input_ids=PROMPTS[2], layer=4).digest()
    with pytest.raises(OptionError, match="quantised already; leave quantize out"):
        sipit.load(tmp_path, quantize="nf4")


def test_states_of_a_batch_are_those_of_each_prompt_alone(quantized: tuple[str, LanguageModel]) -> None:
    _, lm = quantized
    together = last_states(lm, PROMPTS, CUTS)
    for (layer, site), states in zip(CUTS, together, strict=True):
        for ids, state in zip(PROMPTS, states, strict=True):
            alone = lm.capture(input_ids=ids, layer=layer, site=site).states[-1]
            assert float((state - alone).norm()) <= 1e-5 * float(alone.norm())


def test_llm_int8_lets_the_rows_of_a_batch_act_on_one_another(folder: Path) -> None:
    """Why `last_states` runs its prompts one at a time: the same batch, given to the model as it is."""
    lm = sipit.load(folder, quantize="int8")
    tapped = lm.tapped([Cut(4, "block")]).states(torch.stack(PROMPTS))[0][:, -1]
    alone = last_states(lm, PROMPTS, [Cut(4, "block")])[0]
    assert float(((tapped - alone).norm(dim=1) / alone.norm(dim=1)).max()) > 1e-3


@pytest.mark.parametrize("quantize", FOUR_BIT)
def test_prompts_come_back_from_four_bit_models(folder: Path, quantize: str) -> None:
    lm = sipit.load(folder, quantize=quantize)
    found = sipit.invert(lm, lm.capture(input_ids=PROMPTS[3], layer=3))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(PROMPTS[3].tolist()))


@pytest.mark.parametrize("quantize", ["int8", "int8-vectorwise"])
def test_int8_models_are_captured_but_not_inverted(folder: Path, quantize: str) -> None:
    lm = sipit.load(folder, quantize=quantize)
    with pytest.raises(ModelError, match=r"round activations.*'nf4' or 'fp4'"):
        sipit.invert(lm, lm.capture(input_ids=PROMPTS[3], layer=3))
    with pytest.raises(OptionError, match="rounds activations to int8"):
        survey_margins(lm, PROMPTS[:1], [Cut(2, "block")])


@pytest.mark.thorough
@pytest.mark.parametrize("quantize", FOUR_BIT)
def test_states_of_a_four_bit_pass_need_its_weights(folder: Path, quantize: str) -> None:
    seen = sipit.load(folder, quantize=quantize).capture(input_ids=PROMPTS[3], layer=3).states
    other = sipit.load(folder, quantize=next(name for name in FOUR_BIT if name != quantize))
    for lm in (sipit.load(folder), other):
        assert sipit.invert(lm, seen, layer=3).verdict == "unmatched"


def test_the_command_line_inverts_four_bit_models_and_refuses_int8_ones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for quantize in ("nf4", "int8"):
        output: Any = sipit.load(folder, quantize=quantize).model(input_ids=PROMPTS[3][None], output_hidden_states=True)
        torch.save(tuple(states.detach() for states in output.hidden_states), tmp_path / f"{quantize}.pt")
    told = ["--model", str(folder), "--layer", "3", "--no-fit"]
    assert main(["invert", str(tmp_path / "nf4.pt"), *told, "--quantize", "nf4"]) == 0
    assert capsys.readouterr().out == ",".join(map(str, PROMPTS[3].tolist()))
    assert main(["invert", str(tmp_path / "int8.pt"), *told, "--quantize", "int8"]) == 2
    assert "int8 products round activations" in capsys.readouterr().err


def test_quantising_a_loaded_model_gives_what_loading_it_quantised_does(folder: Path) -> None:
    plain = sipit.load(folder)
    for precision in (one for one in PRECISIONS if one.startswith("bnb-")):
        quantize = precision.removeprefix("bnb-")
        made, error = with_rounded_weights(plain, precision)
        loaded = sipit.load(folder, quantize=quantize)
        for ids in PROMPTS[:2]:
            assert torch.equal(
                made.capture(input_ids=ids, layer=4).states, loaded.capture(input_ids=ids, layer=4).states
            )
        assert 1e-3 < error < (0.02 if quantize.startswith("int8") else 0.2)
    assert not is_quantized(plain.model)


def test_precision_measures_the_real_quantisers_beside_the_simulated_ones(folder: Path) -> None:
    plain = sipit.load(folder)
    names: tuple[Precision, ...] = ("int8", "bnb-int8", "bnb-int8-vectorwise", "bnb-nf4", "bnb-fp4")
    assert set(names) <= set(PRECISIONS)
    results = {r.precision: r for r in precision_survey(plain, PROMPTS, [Cut(4, "block")], precisions=names)}
    for name in names[1:]:
        lm = sipit.load(folder, quantize=name.removeprefix("bnb-"))
        (states,) = last_states(lm, PROMPTS, [Cut(4, "block")])
        assert results[name].distance == pytest.approx(float(torch.pdist(states.double()).min()), rel=1e-6)
    with pytest.raises(OptionError, match="quantised weights already"):
        precision_survey(sipit.load(folder, quantize="nf4"), PROMPTS, [Cut(4, "block")])


@pytest.mark.parametrize("quantize", FOUR_BIT)
def test_float64_copy_of_a_four_bit_model_computes_the_same_function(folder: Path, quantize: str) -> None:
    lm = sipit.load(folder, quantize=quantize)
    wide = in_float64(lm)
    assert wide.dtype == torch.float64
    assert not is_quantized(wide.model)  # quantised maps compute in float32, whatever they are given
    (exact,) = float64_distances(wide, [(PROMPTS[0], PROMPTS[1])], Cut(4, "block"))
    (states,) = last_states(lm, PROMPTS[:2], [Cut(4, "block")])
    assert exact == pytest.approx(float((states[0] - states[1]).norm()), rel=1e-5)


@pytest.mark.parametrize("quantize", ["int8", "int8-vectorwise"])
def test_float64_copy_of_an_int8_model_holds_the_weights_its_codes_mean(folder: Path, quantize: str) -> None:
    given: Any = sipit.load(folder).model
    lm = sipit.load(folder, quantize=quantize)
    for _ in range(2):  # before and after a pass of its own: the scales move
        wide: Any = in_float64(lm).model
        for one, two in zip(given.model.layers, wide.model.layers, strict=True):
            weight, meant = one.mlp.up_proj.weight.detach().double(), two.mlp.up_proj.weight
            step = weight.abs().amax(dim=1, keepdim=True) / 127  # the library's grid: one an output channel
            codes = (meant / step).round()
            assert float((meant - codes * step).abs().max()) <= 2**-10 * float(weight.abs().max())  # read in float16
            assert float(((meant - weight).abs() / step).max()) < 0.6
        lm.capture(input_ids=PROMPTS[0], layer=4)


def test_what_cannot_be_quantised_says_why(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="'int4' is unknown; choose from int8, int8-vectorwise, nf4, fp4"):
        sipit.load(folder, quantize="int4")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(OptionError, match="quantised already"):
        sipit.load(tmp_path / "some.gguf", quantize="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(OptionError, match=r"pip install 'sipit\[quantized\]'"):
        sipit.load(folder, quantize="nf4")
