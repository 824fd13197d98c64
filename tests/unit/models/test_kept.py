"""What was measured once is kept for the next process, apart for each machine, and never believed blindly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sipit
from sipit import LanguageModel
from sipit.inversion.inverses.inverse import queries_of
from sipit.inversion.inverses.ridge_inverse import ridge_inverse
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise import noise_floor
from sipit.inversion.noise.token_map import token_map
from sipit.models.kept import KeptFile, kept, kept_tensors
from sipit.models.pass_cost import _STEPS, tokens_a_pass
from sipit.observations import Cut
from tests.tiny_models import random_ids, tiny_model

CUT = Cut(2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIPIT_CACHE", str(tmp_path))
    return tmp_path


def _kept(lm: LanguageModel, calls: list[int]) -> int:
    def make() -> int:
        calls.append(1)
        return 40 + len(calls)

    found: int = kept(lm, "numbers", "n", make, to_json=int, from_json=lambda value: value if value > 0 else None)
    return found


def _file(cache: Path, kind: str) -> Path:
    (path,) = (cache / kind).iterdir()
    return path


def test_a_value_is_made_once_for_all_processes_of_a_machine(cache: Path) -> None:
    calls: list[int] = []
    assert [_kept(LanguageModel(tiny_model("llama")), calls) for _ in range(3)] == [41, 41, 41]
    other = LanguageModel(tiny_model("llama").bfloat16())
    assert (_kept(other, calls), len(calls)) == (42, 2)  # other arithmetic, other value
    assert (_kept(LanguageModel(tiny_model("llama", seed=3)), calls), len(calls)) == (43, 3)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": "other"}', "-1", '"x"', "null", "[1]"])
def test_a_file_that_holds_no_such_value_is_made_anew(content: str, cache: Path) -> None:
    lm, calls = LanguageModel(tiny_model("llama")), [0]
    _kept(lm, calls)
    path = _file(cache, "numbers")
    known = json.loads(path.read_text())
    (key,) = set(known) - {"format"}
    is_value = content[:1] in ("-", '"', "n") or content == "[1]"
    path.write_text(json.dumps({**known, key: json.loads(content)}) if is_value else content)
    assert _kept(lm, calls) == 43
    assert _kept(lm, calls) == 43


def test_a_cache_that_cannot_be_written_costs_the_making(cache: Path) -> None:
    (cache / "numbers").write_text("a file where the folder should be")
    calls: list[int] = []
    assert [_kept(LanguageModel(tiny_model("llama")), calls) for _ in range(2)] == [41, 42]


def test_noise_floors_are_those_that_were_measured(cache: Path) -> None:
    floor = noise_floor(LanguageModel(tiny_model("llama")), CUT)
    assert noise_floor(LanguageModel(tiny_model("llama")), CUT) == floor
    path = _file(cache, "floors")
    known = json.loads(path.read_text())
    (key,) = set(known) - {"format"}
    path.write_text(json.dumps({**known, key: {**known[key], "rest": 2 * known[key]["rest"]}}))
    assert noise_floor(LanguageModel(tiny_model("llama")), CUT).rest == 2 * floor.rest  # it was read


@pytest.mark.parametrize(
    "change",
    [{"rest": 0.1}, {"rest": 0.0}, {"rest": -1.0}, {"first": 1e9}, {"rest_gap": 1e-9}, {"first": "x"}, {"a": 1}],
)
def test_a_floor_that_no_measuring_can_give_is_measured_anew(change: dict[str, object], cache: Path) -> None:
    floor = noise_floor(LanguageModel(tiny_model("llama")), CUT)
    path = _file(cache, "floors")
    known = json.loads(path.read_text())
    (key,) = set(known) - {"format"}
    path.write_text(json.dumps({**known, key: {**known[key], **change}}))
    assert noise_floor(LanguageModel(tiny_model("llama")), CUT) == floor


def test_a_second_process_runs_no_anchors(cache: Path) -> None:
    first, second = Meter(), Meter()
    made = ridge_inverse(LanguageModel(tiny_model("llama")), CUT, first)
    read = ridge_inverse(LanguageModel(tiny_model("llama")), CUT, second)
    assert (first.block_tokens, second.block_tokens) == (made.block_tokens, 0)
    states = torch.randn(5, made.rest.mean.shape[0])
    assert torch.equal(made.scores(queries_of(made, states)), read.scores(queries_of(read, states)))
    _file(cache, "anchors").joinpath("block-2-float32.safetensors").write_bytes(b"broken")
    ridge_inverse(LanguageModel(tiny_model("llama")), CUT, second)
    assert second.block_tokens == made.block_tokens


@pytest.mark.thorough
def test_a_pass_costs_some_tokens_and_the_answer_does_not_depend_on_how_many(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LanguageModel(tiny_model("llama"))
    assert tokens_a_pass(lm) in _STEPS
    seen = lm.capture(input_ids=random_ids(30, seed=1), layer=2)
    found = []
    for price in (0.5, 4.0, 64.0):
        monkeypatch.setattr("sipit.inversion.search.batching.pass_price", lambda *_, price=price: price)
        found.append(sipit.invert(lm, seen))
    assert {(f.verdict, f.input_ids) for f in found} == {("recovered", tuple(random_ids(30, seed=1).tolist()))}
    assert found[0].n_passes > found[2].n_passes
    assert found[0].n_checked < found[2].n_checked


def _tensors(lm: LanguageModel, calls: list[int], *, version: int = 1) -> dict[str, torch.Tensor]:
    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"a": torch.arange(3).float(), "b": torch.full((2, 2), float(len(calls)))}

    file = KeptFile(kind="tables", name="block-2", version=version)
    return kept_tensors(lm, file, make, to_tensors=dict, from_tensors=lambda t: t if len(t["a"]) == 3 else None)


def test_tensors_are_made_once_for_all_processes(cache: Path) -> None:
    calls: list[int] = []
    made = _tensors(LanguageModel(tiny_model("llama")), calls)
    read = _tensors(LanguageModel(tiny_model("llama")), calls)
    assert len(calls) == 1
    assert set(read) == set(made)
    assert all(torch.equal(read[name], made[name]) for name in made)
    _tensors(LanguageModel(tiny_model("llama", seed=3)), calls)
    _tensors(LanguageModel(tiny_model("llama").bfloat16()), calls)
    _tensors(LanguageModel(tiny_model("llama")), calls, version=2)
    assert len(calls) == 4


@pytest.mark.parametrize("damage", ["broken", "not finite", "another format", "a folder", "too short"])
def test_tensors_that_cannot_be_used_are_made_anew(damage: str, cache: Path) -> None:
    calls: list[int] = []
    lm = LanguageModel(tiny_model("llama"))
    _tensors(lm, calls)
    (path,) = _file(cache, "tables").iterdir()
    if damage == "broken":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata()
        bad = torch.tensor([1.0, torch.nan, 2.0]) if damage == "not finite" else torch.arange(3.0)
        bad = bad[:2] if damage == "too short" else bad
        metadata |= {"format": "sipit.others"} if damage == "another format" else {}
        save_file({"a": bad, "b": torch.ones(2, 2)}, path, metadata=metadata)
    assert _tensors(lm, calls)["a"].tolist() == [0.0, 1.0, 2.0]
    assert len(calls) == 2


def test_tensors_too_large_for_a_cache_are_made_each_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sipit.models.kept._MOST_BYTES", 20)
    calls: list[int] = []
    for _ in range(2):
        _tensors(LanguageModel(tiny_model("llama")), calls)
    assert len(calls) == 2
    assert not (cache / "tables").exists()


def test_a_second_process_runs_no_tokens_for_a_token_map(cache: Path) -> None:
    first, second = Meter(), Meter()
    made = token_map(LanguageModel(tiny_model("llama")), CUT, first)
    read = token_map(LanguageModel(tiny_model("llama")), CUT, second)
    assert first.block_tokens > 0
    assert second.block_tokens == 0
    assert torch.equal(made.table, read.table)
    (path,) = _file(cache, "token-maps").iterdir()
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    save_file({**tensors, "table": tensors["table"][1:].contiguous()}, path, metadata=metadata)
    again = token_map(LanguageModel(tiny_model("llama")), CUT, second)  # a table of fewer tokens is no map
    assert torch.equal(again.table, made.table)
    assert second.block_tokens == first.block_tokens
    token_map(LanguageModel(tiny_model("llama")), CUT, second)  # and was kept in its place
    assert second.block_tokens == first.block_tokens
