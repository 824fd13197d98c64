"""Files that other tools wrote, inverted and checked from the command line without any code of one's own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sipit
from sipit import LanguageModel
from sipit.cli import main
from sipit.errors import OptionError
from tests.unit.observations.formats.arrow_files import arrow_folder
from tests.unit.observations.formats.deepspec_files import target_cache
from tests.unit.observations.formats.llama_files import memory, neighbouring_pairs, session

TEXT = "the prompt of another tool"

Run = tuple[int, str, str]


def _run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Run:
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


@pytest.fixture
def states(text_lm: LanguageModel) -> tuple[Tensor, ...]:
    """What transformers itself returns as hidden_states: (1, T, D) each, the last behind the final norm."""
    with torch.no_grad():
        output: Any = text_lm.model(text_lm.encode(TEXT)[None], output_hidden_states=True)
    found: tuple[Tensor, ...] = output.hidden_states
    return found


@pytest.mark.parametrize("layer", ["1", "2", "final"])
def test_tuple_of_transformers_comes_back(
    tmp_path: Path, text_folder: Path, states: tuple[Tensor, ...], capfd: pytest.CaptureFixture[str], layer: str
) -> None:
    torch.save(states, tmp_path / "dump.pt")
    record = tmp_path / "record.json"
    where = ("--layer", layer)
    code, out, err = _run(
        capfd, "invert", tmp_path / "dump.pt", "--model", text_folder, *where, "--json", record, "--no-fit"
    )
    assert (code, out.strip()) == (0, TEXT)
    assert "layer" in err or "final" in err
    assert json.loads(record.read_text())["verdict"] == "recovered"
    assert _run(capfd, "check", record, tmp_path / "dump.pt")[0] == 0
    torch.save(tuple(entry.flip(1) for entry in states), tmp_path / "dump.pt")
    code, out, _ = _run(capfd, "check", record, tmp_path / "dump.pt")
    assert (code, out.startswith("does not hold")) == (1, True)


def test_vllm_file_is_scored_against_the_ids_beside_it(
    tmp_path: Path,
    text_folder: Path,
    text_lm: LanguageModel,
    states: tuple[Tensor, ...],
    capfd: pytest.CaptureFixture[str],
) -> None:
    ids = text_lm.encode(TEXT)
    rows = torch.stack([states[1][0], states[2][0]], dim=1)  # (T, 2, D)
    save_file({"hidden_states": rows, "token_ids": ids}, tmp_path / "a.safetensors")
    told = ("--model", text_folder, "--layers", "1,2", "--layer", "2")
    code, out, err = _run(capfd, "invert", tmp_path / "a.safetensors", *told)
    assert (code, out.strip()) == (0, TEXT)
    assert "exact     yes" in err
    save_file({"hidden_states": rows, "token_ids": ids.flip(0)}, tmp_path / "a.safetensors")
    code, out, err = _run(capfd, "invert", tmp_path / "a.safetensors", *told)
    assert (code, out.strip()) == (0, TEXT)  # what lies beside is never read by the search
    assert "exact     NO" in err


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_widened_rows_are_inverted_with_the_rounding_they_once_had(
    tmp_path: Path, text_lm: LanguageModel, states: tuple[Tensor, ...], stored: str
) -> None:
    rows = states[2][0].to(getattr(torch, stored)).float().numpy()
    np.save(tmp_path / "rows.npy", rows)
    found = sipit.invert(text_lm, tmp_path / "rows.npy", layer=2)
    assert (found.verdict, found.text) == ("recovered", TEXT)
    assert found.observation_dtype == stored


def test_folder_of_other_files_goes_past_a_broken_one(
    tmp_path: Path, text_folder: Path, states: tuple[Tensor, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    np.save(folder / "a.npy", states[2][0].numpy())
    np.save(folder / "b.npy", np.full((3, 4), np.nan, np.float32))
    torch.save(states[2], folder / "c.pt")
    code, out, err = _run(capfd, "invert", folder, "--model", text_folder, "--layer", "2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [line["text"] for line in lines if "text" in line] == [TEXT, TEXT]
    assert sum("NaN" in line.get("refused", "") for line in lines) == 1
    assert "recovered 2 of 3" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "choose with --layer"),
        (["--layer", "99"], "holds layers 0 to 2"),
        (["--layer", "2", "--prompt", "4"], "--prompt 4 is not there"),
        (["--layers", "1,x"], "--layers takes"),
    ],
)
def test_ambiguous_or_wrong_word_is_refused(
    tmp_path: Path,
    text_folder: Path,
    states: tuple[Tensor, ...],
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    torch.save(states, tmp_path / "dump.pt")
    code, out, err = _run(capfd, "invert", tmp_path / "dump.pt", "--model", text_folder, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err


def test_array_without_a_layer_and_a_file_without_a_model_are_refused(
    tmp_path: Path, text_lm: LanguageModel, states: tuple[Tensor, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rows.npy", states[2][0].numpy())
    with pytest.raises(OptionError, match="--layer"):
        sipit.invert(text_lm, tmp_path / "rows.npy")
    code, _, err = _run(capfd, "invert", tmp_path / "rows.npy", "--layer", "2")
    assert code == 2
    assert "--model" in err


def test_own_file_is_not_overruled(
    tmp_path: Path, text_folder: Path, text_lm: LanguageModel, capfd: pytest.CaptureFixture[str]
) -> None:
    sipit.write_observation(text_lm.capture(TEXT, layer=1), tmp_path / "own")
    code, _, err = _run(capfd, "invert", tmp_path / "own", "--model", text_folder, "--layer", "2")
    assert code == 2
    assert "leave --layer" in err


def test_float8_rows_with_their_scales_come_back(
    tmp_path: Path, text_folder: Path, states: tuple[Tensor, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = states[2][0]
    scales = rows.abs().amax(dim=1, keepdim=True) / 448
    stored = {"hidden_states": (rows / scales).to(torch.float8_e4m3fn)[:, None], "hidden_states_scales": scales}
    save_file({**stored, "token_ids": torch.arange(len(rows))}, tmp_path / "f8.safetensors")
    code, out, err = _run(capfd, "invert", tmp_path / "f8.safetensors", "--model", text_folder, "--layer", "2")
    assert (code, out.strip()) == (0, TEXT)
    assert "float8_e4m3fn with a scale a row" in err


@pytest.mark.thorough
def test_answer_of_sglang_comes_back(
    tmp_path: Path, text_folder: Path, states: tuple[Tensor, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    answer = {
        "text": "",
        "meta_info": {"hidden_states": [states[-1][0].tolist()], "prompt_tokens": states[-1].shape[1]},
    }
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    code, out, _ = _run(capfd, "invert", tmp_path / "answer.json", "--model", text_folder)
    assert (code, out.strip()) == (0, TEXT)


@pytest.mark.thorough
@pytest.mark.parametrize("site", ["kv", "keys", "values"])
def test_session_of_llama_cpp_comes_back(
    tmp_path: Path, text_folder: Path, text_lm: LanguageModel, capfd: pytest.CaptureFixture[str], site: str
) -> None:
    ids = text_lm.encode(TEXT)
    assert text_lm.d_head is not None
    keys = [text_lm.capture(input_ids=ids, layer=i, site="keys").states for i in range(text_lm.n_layers)]
    values = [text_lm.capture(input_ids=ids, layer=i, site="values").states for i in range(text_lm.n_layers)]
    turned = [neighbouring_pairs(rows, text_lm.d_head) for rows in keys]
    path = session(tmp_path / "session.bin", ids.tolist(), memory(turned, values))
    record = tmp_path / "record.json"
    told = ("--model", text_folder, "--layer", "1", "--site", site)
    code, out, err = _run(capfd, "invert", path, *told, "--json", record)
    assert (code, out.strip()) == (0, TEXT)
    assert "in clear" in err
    assert "exact     yes" in err
    assert _run(capfd, "check", record, path, "--site", site)[0] == 0
    assert _run(capfd, "verify", path, *told)[0] == 0


@pytest.mark.thorough
def test_prompt_cache_of_mlx_comes_back(
    tmp_path: Path, text_folder: Path, text_lm: LanguageModel, capfd: pytest.CaptureFixture[str]
) -> None:
    ids = text_lm.encode(TEXT)
    with torch.no_grad():
        cache = text_lm.model(ids[None], use_cache=True).past_key_values
    tensors = {
        f"{i}.{n}": part.contiguous()
        for i, at in enumerate(cache.layers)
        for n, part in enumerate((at.keys, at.values))
    }
    save_file(tensors, tmp_path / "cache.safetensors", metadata={f"2.{i}": "KVCache" for i in range(len(cache.layers))})
    told = ("--model", text_folder, "--layer", "2", "--site", "keys")
    code, out, _ = _run(capfd, "invert", tmp_path / "cache.safetensors", *told)
    assert (code, out.strip()) == (0, TEXT)


@pytest.mark.parametrize("where", [("--layer", "2"), ("--site", "final")])
def test_target_cache_of_deepspec_comes_back(
    tmp_path: Path,
    text_folder: Path,
    text_lm: LanguageModel,
    states: tuple[Tensor, ...],
    capfd: pytest.CaptureFixture[str],
    where: tuple[str, str],
) -> None:
    ids = text_lm.encode(TEXT).tolist()
    joined = torch.stack([states[1][0], states[2][0]], dim=1)
    target_cache(tmp_path / "cache", [(ids, joined, states[-1][0])], [0, 1], padding=3)
    code, out, err = _run(capfd, "invert", tmp_path / "cache", "--model", text_folder, *where)
    assert (code, out.strip()) == (0, TEXT)
    assert "exact     yes" in err


def test_context_of_sae_lens_comes_back(
    tmp_path: Path,
    text_folder: Path,
    text_lm: LanguageModel,
    states: tuple[Tensor, ...],
    capfd: pytest.CaptureFixture[str],
) -> None:
    ids = text_lm.encode(TEXT)
    arrow_folder(tmp_path / "cache", states[2].repeat(2, 1, 1), ids.repeat(2, 1), hook="blocks.1.hook_resid_post")
    code, out, err = _run(capfd, "invert", tmp_path / "cache", "--model", text_folder, "--prompt", "1")
    assert (code, out.strip()) == (0, TEXT)
    assert "exact     yes" in err


def test_dump_is_identified_and_verified(
    tmp_path: Path,
    text_folder: Path,
    text_lm: LanguageModel,
    states: tuple[Tensor, ...],
    capfd: pytest.CaptureFixture[str],
) -> None:
    ids, record = text_lm.encode(TEXT), tmp_path / "record.json"
    save_file({"hidden_states": states[2][0][:, None].contiguous(), "token_ids": ids}, tmp_path / "a.safetensors")
    code, out, _ = _run(capfd, "identify", tmp_path / "a.safetensors", "--model", text_folder, "--json", record)
    assert code == 0
    assert "block" in out
    fit = json.loads(record.read_text())["fits"][0]
    assert (fit["layer"], fit["site"], fit["scale"], fit["offset"]) == (2, "block", 1.0, 0)
    told = ("--model", text_folder, "--layer")
    assert _run(capfd, "verify", tmp_path / "a.safetensors", *told, "2")[0] == 0
    code, out, _ = _run(capfd, "verify", tmp_path / "a.safetensors", *told, "1", "--json", record)
    assert (code, out.startswith("does not hold")) == (1, True)
    bad = json.loads(record.read_text())["bad_rows"]
    assert len(bad) == len(ids)
    assert "layer 2" in bad[3]["instead"]
    save_file({"hidden_states": torch.randn(5, 1, 32), "token_ids": ids[:5]}, tmp_path / "b.safetensors")
    code, out, _ = _run(capfd, "identify", tmp_path / "b.safetensors", "--model", text_folder, "--json", record)
    assert (code, json.loads(record.read_text())["fits"]) == (1, [])
    assert "none of these" in out


def test_folder_is_verified_file_by_file(
    tmp_path: Path,
    text_folder: Path,
    text_lm: LanguageModel,
    states: tuple[Tensor, ...],
    capfd: pytest.CaptureFixture[str],
) -> None:
    ids, folder = text_lm.encode(TEXT), tmp_path / "dumps"
    folder.mkdir()
    rows = states[2][0][:, None].contiguous()
    for name in ("a", "b", "c"):
        save_file({"hidden_states": rows, "token_ids": ids}, folder / f"{name}.safetensors")
    rows[3] = rows[2]
    save_file({"hidden_states": rows, "token_ids": ids}, folder / "d.safetensors")
    (folder / "e.safetensors").write_bytes(b"broken")
    code, out, err = _run(capfd, "verify", folder, "--model", text_folder, "--layer", "2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [line["holds"] for line in lines if "holds" in line] == [True, True, True, False]
    assert "3 of 5 hold, refused 1" in err


@pytest.mark.thorough
@pytest.mark.parametrize("n_before", [0, 3])
def test_rows_of_zeros_at_either_end_are_padding(
    n_before: int, tmp_path: Path, text_folder: Path, states: tuple[Tensor, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    rows, record = states[2][0], tmp_path / "record.json"
    padded = torch.cat([rows.new_zeros(n_before, rows.shape[1]), rows, rows.new_zeros(2, rows.shape[1])])
    np.save(tmp_path / "a.npy", padded.numpy())
    told = ("--model", text_folder, "--layer", "2", "--json", record)
    code, out, err = _run(capfd, "invert", tmp_path / "a.npy", *told)
    assert (code, out.strip()) == (0, TEXT)
    assert f"padding: {n_before + 2} rows of zeros cut ({n_before} before, 2 behind)" in err
    assert _run(capfd, "check", record, tmp_path / "a.npy")[0] == 0


def test_top_logits_are_named_where_rows_are_identified(
    tmp_path: Path, text_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    top = torch.randn(4, 60).topk(20, dim=1)
    torch.save({"values": top.values, "indices": top.indices}, tmp_path / "a.pt")
    code, _, err = _run(capfd, "identify", tmp_path / "a.pt", "--model", text_folder)
    assert code == 2
    assert "'sipit invert' reads it" in err


@pytest.mark.parametrize("command", [["invert", "--layer", "2"], ["identify"], ["audit", "--layer", "2"]])
def test_states_that_were_saved_with_their_graph_are_read_without_a_word(
    command: list[str], text_folder: Path, tmp_path: Path
) -> None:
    """Whoever forgets no_grad saves tensors that require a gradient; torch warns wherever one becomes a number."""
    states = sipit.load(text_folder).capture("saved so", layer=2).states.requires_grad_()
    torch.save({"states": states}, tmp_path / "h.pt")
    more = ["--out", str(tmp_path / "out"), "--fail-above", "1"] if command[0] == "audit" else []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([command[0], str(tmp_path / "h.pt"), "--model", str(text_folder), *command[1:], *more]) == 0
