"""Many observations, fits and benchmarks from the command line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sipit
from sipit import LanguageModel
from sipit.cli import main
from sipit.errors import InputError, StorageError
from sipit.observations import read_observations, write_observations
from sipit.storage import LineLog

_LINES = ["first prompt", "a second\u2028one", "third: 😀"]


@pytest.fixture
def many_file(tmp_path: Path, text_folder: Path) -> Path:
    lines = tmp_path / "lines.txt"
    lines.write_bytes("\n".join(_LINES).encode())
    out = tmp_path / "many.safetensors"
    args = ["capture", "--lines-file", str(lines), "--model", str(text_folder), "--layer", "2", "--out", str(out)]
    assert main(args) == 0
    return out


def test_every_line_comes_back(many_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    capfd.readouterr()
    assert main(["invert", str(many_file), "--json", str(out)]) == 0
    printed = [json.loads(line) for line in capfd.readouterr().out.rstrip("\n").split("\n")]
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert [p["text"] for p in printed] == [r["text"] for r in records] == _LINES
    assert all(r["verdict"] == "recovered" for r in records)


@pytest.mark.thorough
def test_second_run_goes_on_where_the_first_stopped(
    many_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["invert", str(many_file), "--json", str(out)]) == 0
    whole = out.read_bytes()
    lines = whole.split(b"\n")
    out.write_bytes(b"\n".join(lines[:1]) + b"\n" + lines[1][:30])  # killed while it wrote the second
    capfd.readouterr()
    assert main(["invert", str(many_file), "--json", str(out)]) == 0
    captured = capfd.readouterr()
    assert len(captured.out.rstrip("\n").split("\n")) == 2
    assert "already holds 1 of 3" in captured.err
    texts = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert texts == _LINES


@pytest.mark.thorough
def test_redacted_lines_hold_no_prompt_and_are_gone_on_from(
    many_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["invert", str(many_file), "--json", str(out), "--redact"]) == 0
    raw = out.read_text(encoding="utf-8")
    assert raw.count('"verdict": "recovered"') == len(_LINES)
    assert "first" not in raw
    assert "input_ids" not in raw
    assert main(["invert", str(many_file), "--json", str(out), "--redact"]) == 0
    assert "already holds 3 of 3" in capfd.readouterr().err


@pytest.mark.thorough
def test_line_of_the_output_is_a_certificate(many_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    main(["invert", str(many_file), "--json", str(out)])
    (tmp_path / "one.json").write_text(out.read_text(encoding="utf-8").split("\n")[0], encoding="utf-8")
    (_, first), *_ = read_observations(many_file)
    sipit.write_observation(first, tmp_path / "one.safetensors")
    assert main(["check", str(tmp_path / "one.json"), str(tmp_path / "one.safetensors")]) == 0


@pytest.mark.parametrize("content", ["my notes", "my notes\nmore\n", "[1]\n", "12\n"])
def test_output_that_is_something_else_is_kept(many_file: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "notes.txt"
    out.write_text(content)
    assert main(["invert", str(many_file), "--json", str(out)]) == 2
    assert out.read_text() == content


def test_folder_is_read_by_name(text_lm: LanguageModel, tmp_path: Path) -> None:
    for name in ("b", "a"):
        sipit.write_observation(text_lm.capture(name, layer=1), tmp_path / f"{name}.safetensors")
    write_observations([text_lm.capture("x", layer=1)], tmp_path / "c.safetensors")
    names = [name for name, _ in read_observations(tmp_path)]
    assert names == ["a.safetensors", "b.safetensors", "c.safetensors:states.000000"]


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.safetensors"):
        list(read_observations(tmp_path))


def test_truncated_file_of_many_is_refused(text_lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    write_observations([text_lm.capture("x", layer=1)], path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="whole"):
        list(read_observations(path))


def test_line_log_keeps_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "log"
    LineLog(path).append({"a": "\u2028\x85"})
    log = LineLog(path)
    log.append({"b": 2})
    assert LineLog(path).records() == [{"a": "\u2028\x85"}, {"b": 2}]


def test_line_log_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        LineLog(tmp_path)


def test_only_work_that_pays_is_worth_fitting(
    text_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIPIT_CACHE", str(tmp_path))
    seen = [text_lm.capture("ten tokens", layer=layer) for layer in (0, 1, 1, 2)]
    many = sys.modules["sipit.inversion.invert"]  # the package has a function of that name
    monkeypatch.setattr(many, "FIT_PAYS_AFTER", 15)
    assert many.worth_fitting(text_lm, seen) == [(1, "block")]


def test_resume_file_is_used_and_removed(text_lm: LanguageModel, text_folder: Path, tmp_path: Path) -> None:
    from sipit.inversion import PrefixFile

    file = tmp_path / "o.safetensors"
    main(["capture", "--text", "resumed text", "--model", str(text_folder), "--layer", "2", "--out", str(file)])
    seen = sipit.read_observation(file)
    PrefixFile(tmp_path / "p.json", seen).save(text_lm.encode("resumed te").tolist())
    out = tmp_path / "r.json"
    args = ["invert", str(file), "--policy", "vocabulary", "--resume", str(tmp_path / "p.json"), "--json", str(out)]
    assert main(args) == 0
    assert not (tmp_path / "p.json").exists()
    record = json.loads(out.read_text())
    assert [p["n_checked"] for p in record["positions"][:10]] == [1] * 10


@pytest.mark.thorough
def test_bench_writes_the_agreed_keys(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "t.txt"
    text.write_text("some words to cut prompts from, and a few more of them")
    out = tmp_path / "bench.json"
    methods = ["auto", "auto-no-fit", "vocabulary-matching", "reference-sipit", "random"]
    args = ["bench", "--model", str(text_folder), "--layer", "2", "--layer", "final", "--text-file", str(text)]
    args += ["--tokens", "5", "--prompts", "2", "--json", str(out)]
    assert main([*args, *(a for m in methods for a in ("--method", m))]) == 0
    runs = json.loads(out.read_text())["runs"]
    keys = {"method", "layer", "prompt", "seq_len", "exact", "seconds", "block_tokens", "prefill_ratio", "n_checked"}
    keys |= {"wall_ratio", "n_passes"}
    assert len(runs) == 2 * 2 * len(methods)
    assert all(keys <= set(run) and run["exact"] and run["seq_len"] == 5 for run in runs)
    assert all(run["prefill_ratio"] == pytest.approx(run["block_tokens"] / (5 * run["layer"])) for run in runs)
    table = capsys.readouterr().out
    assert all(method in table for method in methods)


@pytest.mark.parametrize(
    "extra",
    [
        ["--layer", "2"],
        ["--layer", "2", "--random-ids", "--method", "magic"],
        ["--layer", "two", "--random-ids"],
        ["--layer", "99", "--random-ids"],
        ["--layer", "2", "--random-ids", "--tokens", "0"],
    ],
)
def test_bench_refuses_bad_options(text_folder: Path, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", str(text_folder), *extra]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.thorough
def test_records_of_other_observations_are_not_counted(
    text_lm: LanguageModel, text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    for name, texts in (("first", ["one", "two"]), ("second", ["three", "four"])):
        (tmp_path / name).mkdir()
        for text in texts:
            sipit.write_observation(text_lm.capture(text, layer=2), tmp_path / name / f"{text}.safetensors")
    wrong = text_lm.capture("three", layer=2)
    wrong.states[:] += 1.0
    sipit.write_observation(wrong, tmp_path / "second" / "three.safetensors")
    arguments = ["--model", str(text_folder), "--any-model", "--json", str(log)]
    assert main(["invert", str(tmp_path / "first"), *arguments]) == 0
    for _ in range(2):  # the second time from the log alone, where one record is unmatched
        capfd.readouterr()
        assert main(["invert", str(tmp_path / "second"), *arguments]) == 1
        assert "recovered 1 of 2 prompts" in capfd.readouterr().err


@pytest.mark.thorough
def test_equal_observations_count_each(
    text_lm: LanguageModel, text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        sipit.write_observation(text_lm.capture("twice", layer=2), tmp_path / "d" / f"{name}.safetensors")
    for _ in range(2):
        arguments = ["--model", str(text_folder), "--any-model", "--json", str(tmp_path / "log")]
        assert main(["invert", str(tmp_path / "d"), *arguments]) == 0
        assert "recovered 2 of 2 prompts" in capfd.readouterr().err


def test_observation_of_another_model_does_not_stop_the_others(
    text_lm: LanguageModel, text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    good = text_lm.capture("good", layer=2)
    narrow = replace(good, states=good.states[:, :-1])
    foreign = replace(good, fingerprint="sha256:" + "0" * 64, model="other")
    good = replace(good, fingerprint=None)
    for name, seen in {"a": replace(narrow, fingerprint=None, model=None), "b": good, "c": foreign}.items():
        sipit.write_observation(seen, tmp_path / "d" / f"{name}.safetensors")
    assert main(["invert", str(tmp_path / "d"), "--model", str(text_folder)]) == 1
    out, err = capfd.readouterr()
    lines = {line["file"]: line for line in map(json.loads, out.rstrip("\n").split("\n"))}
    assert lines["b.safetensors"]["text"] == "good"
    assert "wide" in lines["a.safetensors"]["refused"]
    assert "fingerprint" in lines["c.safetensors"]["refused"]
    assert lines["a.safetensors"]["refused"] in err
    assert "recovered 1 of 3 prompts, refused 2" in err


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
def test_files_that_hold_a_prompt_are_their_owners_alone(many_file: Path, tmp_path: Path) -> None:
    log, one, certificate = tmp_path / "log", tmp_path / "one.safetensors", tmp_path / "c.json"
    assert main(["invert", str(many_file), "--json", str(log)]) == 0
    (_, first), *_ = read_observations(many_file)
    sipit.write_observation(first, one)
    assert main(["invert", str(one), "--json", str(certificate)]) == 0
    assert [path.stat().st_mode & 0o777 for path in (log, certificate)] == [0o600, 0o600]


def test_layer_that_has_a_fit_is_reported_and_not_fitted_again(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Made:
        report: dict[str, object] = {"fit_block_tokens": 7, "seconds": 1.0, "held_out": {}}  # noqa: RUF012

    calls = []

    def fitted(_: LanguageModel, cuts: list[tuple[int, str]], **__: object) -> dict[tuple[int, str], Path]:
        calls.append(cuts)
        return dict.fromkeys(cuts, Path("made"))

    monkeypatch.setattr("sipit.inversion.inverses.store.load_fit", lambda *_: Made)
    monkeypatch.setattr("sipit.inversion.fitting.fit_inverse", fitted)
    arguments = ["fit", "--layer", "2", "--model", str(text_folder)]
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert (calls, "layer 2" in out, "--again" in err) == ([], True, True)
    assert main([*arguments, "--again"]) == 0
    assert calls == [[(2, "block")]]


def test_broken_or_foreign_file_in_a_folder_is_named_and_the_others_inverted(
    many_file: Path, text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    (_, first), *_ = read_observations(many_file)
    sipit.write_observation(first, tmp_path / "d" / "b.safetensors")
    (tmp_path / "d" / "a.safetensors").write_bytes(b"not a file of tensors")
    save_file({"x": torch.ones(2, 2)}, tmp_path / "d" / "c.safetensors")
    capfd.readouterr()
    assert main(["invert", str(tmp_path / "d"), "--model", str(text_folder)]) == 1
    out, err = capfd.readouterr()
    lines = {line["file"]: line for line in map(json.loads, out.rstrip("\n").split("\n"))}
    assert lines["b.safetensors"]["verdict"] == "recovered"
    assert {name for name, line in lines.items() if "refused" in line} == {"a.safetensors", "c.safetensors"}
    assert "recovered 1 of 3 prompts, refused 2" in err


@pytest.mark.skipif(os.name != "posix", reason="needs a device file")
@pytest.mark.parametrize("option", ["--text-file", "--lines-file"])
def test_text_from_a_device_without_end_is_refused(
    text_folder: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["capture", option, "/dev/zero", "--layer", "1", "--out", str(out), "--model", str(text_folder)]
    assert main(arguments) == 2
    assert "/dev/zero" in capsys.readouterr().err
    assert not out.exists()
