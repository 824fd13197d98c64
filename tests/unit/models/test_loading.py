"""From a name to a model, or to one sentence that says why not."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as library_logging

import sipit
from sipit import LanguageModel, SipitError
from sipit.errors import ModelError, OptionError
from tests.tiny_models import FAMILIES, random_ids, tiny_model, true_states

IDS = random_ids(6, seed=12)


def test_saved_folder_loads_as_the_same_model(text_folder: Path, text_lm: LanguageModel) -> None:
    lm = sipit.load(text_folder)
    assert lm.fingerprint == text_lm.fingerprint
    assert lm.name == str(text_folder)
    assert lm.capture("the same", layer=2).digest() == text_lm.capture("the same", layer=2).digest()
    assert not lm.model.training


def test_tokenizer_of_a_folder_keeps_bos_and_template(bos_folder: Path) -> None:
    lm = sipit.load(str(bos_folder))
    assert lm.decode(lm.encode("hi")) == "<s>hi"
    assert lm.decode(lm.encode("hi", chat=True)) == "<s>user\nhi<e>\n<s>assistant\n"


def test_folder_without_a_tokenizer_takes_ids_only(ids_folder: Path) -> None:
    lm = sipit.load(ids_folder)
    assert lm.tokenizer is None
    found = sipit.invert(lm, lm.capture(input_ids=IDS, layer=1))
    assert (found.input_ids, found.text) == (tuple(IDS.tolist()), None)


def test_folder_may_be_relative_or_under_the_home_folder(ids_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ids_folder.parent)
    assert sipit.load(ids_folder.name).n_layers == 4
    assert sipit.load(f"./{ids_folder.name}").n_layers == 4
    monkeypatch.setenv("HOME", str(ids_folder.parent))
    assert sipit.load(f"~/{ids_folder.name}").n_layers == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", torch.float16])
def test_weights_are_loaded_in_the_dtype_asked_for(ids_folder: Path, dtype: str | torch.dtype) -> None:
    lm = sipit.load(ids_folder, dtype=dtype, device="cpu")
    assert str(lm.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")


def test_stored_dtype_is_kept_by_default(ids_folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(ids_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    lm = sipit.load(tmp_path / "bf16")
    assert lm.dtype == torch.bfloat16
    states = true_states(lm.model, "llama", IDS)[(1, "block")]
    assert sipit.invert(lm, states, layer=1).input_ids == tuple(IDS.tolist())


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "no such folder"), ("absent.gguf", "no such file"), ("empty", "cannot load")],
)
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=message) as caught:
        sipit.load(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusal_of_a_long_name_is_short() -> None:
    with pytest.raises(ModelError) as raised:
        sipit.load("x" * 10**6)
    assert len(str(raised.value)) < 500


def test_unknown_hub_id_is_refused_with_the_names_it_could_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="smollm2-135m"):
        sipit.load("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("not json"),
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"})),
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "t5"})),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000]),
    ],
)
def test_damaged_folder_is_refused(ids_folder: Path, tmp_path: Path, damage: Any) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(ids_folder, folder)
    damage(folder)
    with pytest.raises(ModelError, match="damaged"):
        sipit.load(folder)


def test_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError):
        sipit.load(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "change", [{"dtype": 1.5}, {"vocab_size": {}}, {"attention_bias": 10**40}, {"model_type": "x"}]
)
def test_nonsense_in_a_config_is_refused_in_one_short_sentence(
    ids_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(ids_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match="damaged") as caught:
        sipit.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(folder))


def test_gguf_file_that_claims_more_blocks_than_tensors_is_refused_at_once(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(2**30)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"model\.gguf.*claims 1073741824 blocks"):
        sipit.load(tmp_path / "model.gguf")


def test_folder_with_weights_missing_is_not_filled_at_random(ids_folder: Path, tmp_path: Path) -> None:
    """The library would draw the absent weights anew at each load, and warn where nobody reads."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "incomplete"
    shutil.copytree(ids_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="incomplete"):
        sipit.load(folder)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "", "meta"])
def test_unknown_device_is_refused(ids_folder: Path, device: str) -> None:
    with pytest.raises(OptionError, match="device"):
        sipit.load(ids_folder, device=device)


@pytest.mark.parametrize("dtype", ["int8", "nonsense", torch.int32])
def test_unknown_dtype_is_refused(ids_folder: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(OptionError, match="dtype"):
        sipit.load(ids_folder, dtype=dtype)


def test_loading_leaves_the_librarys_settings_alone(ids_folder: Path) -> None:
    library_logging.set_verbosity_info()
    before = (library_logging.get_verbosity(), library_logging.is_progress_bar_enabled(), list(warnings.filters))
    sipit.load(ids_folder)
    after = (library_logging.get_verbosity(), library_logging.is_progress_bar_enabled(), list(warnings.filters))
    library_logging.set_verbosity_warning()
    assert after == before


def test_loading_is_silent(ids_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sipit.load(ids_folder)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_every_refusal_is_a_sipit_error() -> None:
    assert issubclass(ModelError, SipitError)
    assert issubclass(OptionError, SipitError)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_alone_take_ids_only_in_every_family(tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    lm = sipit.load(tmp_path, device="cpu")
    assert lm.tokenizer is None
    assert sipit.invert(lm, lm.capture(input_ids=[1, 2, 3], layer=2)).input_ids == (1, 2, 3)


@pytest.mark.parametrize("model_type", ["strange", None])
def test_code_in_a_model_folder_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str | None
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    config["model_type"] = model_type or config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if model_type is None:  # a family that transformers has: its own code reads the weights
        assert sipit.load(tmp_path, device="cpu").n_layers == 4
    else:
        with pytest.raises(ModelError, match=r"code of its own.*never run") as caught:
            sipit.load(tmp_path, device="cpu")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_folder_of_a_trunk_is_refused_unless_its_embedding_is_its_head(tmp_path: Path) -> None:
    tiny_model("gpt2").base_model.save_pretrained(tmp_path / "tied")
    assert sipit.load(tmp_path / "tied", device="cpu").n_layers == 4
    tiny_model("llama").base_model.save_pretrained(tmp_path / "untied")
    with pytest.raises(ModelError, match="lm_head"):
        sipit.load(tmp_path / "untied", device="cpu")
