"""The commands end to end: results on standard output byte for byte, the rest on standard error, exit codes."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sipit
from sipit import LanguageModel
from sipit.cli import main

Run = Callable[..., tuple[int, bytes, bytes]]
TEXTS = [
    "plain",
    "two newlines at the end\n\n",
    "\n",
    "tabs\t\r\n",
    "🦔 emoji 🏳️‍🌈",
    "é",
    "100 % [bold]markup[/bold] \\ \0",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str | Path) -> tuple[int, bytes, bytes]:
        capfdbinary.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfdbinary.readouterr()
        return code, out, err

    return command


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_byte_for_byte(run: Run, tmp_path: Path, text_folder: Path, text: str) -> None:
    (tmp_path / "prompt").write_bytes(text.encode())
    code, out, err = run("capture", "--text-file", "prompt", "--layer", "2", "--out", "seen", "--model", text_folder)
    assert (code, out) == (0, b"")
    assert b"layer 2" in err
    code, out, err = run("invert", "seen", "--json", "c.json")  # the file names its model
    assert (code, out) == (0, text.encode())
    assert b"verdict   recovered" in err
    assert b"plain forward pass" in err
    code, out, _ = run("check", "c.json", "seen", "--json", "outcome.json")
    assert code == 0
    assert out.startswith(b"holds: ")
    outcome = json.loads((tmp_path / "outcome.json").read_bytes())
    assert (outcome["holds"], outcome["reasons"], outcome["verdict"]) == (True, [], "recovered")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "outcome.json", "prompt", "seen"]


def test_record_holds_what_was_found(run: Run, tmp_path: Path, text_folder: Path) -> None:
    run("capture", "--text", "record", "--layer", "2", "--out", "seen", "--model", text_folder)
    _, _, err = run("invert", "seen", "--policy", "vocabulary", "--json", "c.json")
    record = json.loads((tmp_path / "c.json").read_text("utf-8"))
    lm = sipit.load(text_folder)
    assert record["text"] == "record"
    assert f"(tolerance {record['tolerance']:.2g})" in err.decode()
    assert record["input_ids"] == lm.encode("record").tolist()
    assert record["model"] == str(text_folder)
    assert (record["layer"], record["site"], record["policy"]) == (2, "block", "vocabulary")
    assert record["prefill_ratio"] == pytest.approx(record["block_tokens"] / (6 * 2))
    assert [p["token"] for p in record["positions"]] == list("record")


def test_redacted_record_is_written_without_the_prompt_and_refused_by_check(
    run: Run, tmp_path: Path, text_folder: Path
) -> None:
    run("capture", "--text", "zyx qvj", "--layer", "2", "--out", "seen", "--model", text_folder)
    code, out, _ = run("invert", "seen", "--json", "c.json", "--redact")
    assert (code, out) == (0, b"zyx qvj")
    raw = (tmp_path / "c.json").read_text("utf-8")
    assert json.loads(raw)["verdict"] == "recovered"
    assert "zyx" not in raw
    assert "input_ids" not in raw
    code, out, err = run("check", "c.json", "seen")
    assert (code, out) == (2, b"")
    assert err.startswith(b"sipit: c.json is redacted")
    assert err.count(b"\n") == 1
    assert run("invert", "seen", "--redact")[0] == 2  # nothing is written that could be


def test_bos_and_chat_template_are_part_of_the_text(run: Run, bos_folder: Path) -> None:
    run("capture", "--text", "hi", "--layer", "1", "--out", "seen", "--model", bos_folder)
    assert run("invert", "seen")[:2] == (0, b"<s>hi")
    run("capture", "--text", "hi", "--chat", "--layer", "1", "--out", "seen", "--model", bos_folder)
    assert run("invert", "seen")[:2] == (0, b"<s>user\nhi<e>\n<s>assistant\n")


def test_ids_come_back_as_ids_without_a_tokenizer(run: Run, ids_folder: Path) -> None:
    run("capture", "--ids", "7, 149,0", "--layer", "3", "--out", "seen", "--model", ids_folder)
    assert run("invert", "seen")[:2] == (0, b"7,149,0")


def test_site_final_needs_no_layer(run: Run, text_folder: Path) -> None:
    code, _, err = run("capture", "--text", "end", "--site", "final", "--out", "seen", "--model", text_folder)
    assert code == 0
    assert b"layer 3, site final" in err
    assert run("invert", "seen")[:2] == (0, b"end")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_stored_dtype_is_kept_and_recovered(run: Run, text_folder: Path, dtype: str) -> None:
    arguments = ("capture", "--text", "stored", "--layer", "1", "--store-dtype", dtype, "--out", "seen")
    run(*arguments, "--model", text_folder)
    assert sipit.read_observation("seen").dtype == dtype
    assert run("invert", "seen")[:2] == (0, b"stored")


def test_unmatched_states_exit_with_one_and_the_prefix(run: Run, tmp_path: Path, text_lm: LanguageModel) -> None:
    seen = text_lm.capture("prefix kept", layer=1)
    seen.states[6:] += 1.0
    sipit.write_observation(seen, tmp_path / "seen")
    text_lm.model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    text_lm.tokenizer.save_pretrained(tmp_path / "m")
    code, out, err = run("invert", "seen", "--model", "m", "--json", "c.json")
    assert (code, out) == (1, b"prefix")
    assert b"unmatched: position 6" in err
    code, out, _ = run("check", "c.json", "seen", "--model", "m")
    assert code == 1
    assert out.startswith(b"does not hold: ")


def test_edited_certificate_exits_with_one_and_the_reason(run: Run, tmp_path: Path, text_folder: Path) -> None:
    run("capture", "--text", "sworn", "--layer", "1", "--out", "seen", "--model", text_folder)
    run("invert", "seen", "--json", "c.json")
    record = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**record, "text": "sworm"}))
    code, out, _ = run("check", "c.json", "seen")
    assert code == 1
    assert b"edited" in out


def test_ambiguous_noise_exits_with_one(run: Run, tmp_path: Path, text_folder: Path, text_lm: LanguageModel) -> None:
    seen = text_lm.capture("noisy", layer=1)
    seen.states[:] += 0.001
    sipit.write_observation(seen, tmp_path / "seen")
    code, out, err = run("invert", "seen", "--model", text_folder, "--noise", "0.02")
    assert (code, out) == (1, b"noisy")
    assert b"ambiguous" in err


def test_sentence_about_rows_that_cannot_be_the_models_names_their_file(
    run: Run, tmp_path: Path, text_folder: Path, text_lm: LanguageModel
) -> None:
    states = text_lm.capture("rows", layer=1).states
    for bad in (states[:, :-1], states * 1e30):
        sipit.write_observation(sipit.Observation(states=bad.contiguous(), layer=1), tmp_path / "bad")
        code, out, err = run("invert", "bad", "--model", text_folder)
        assert (code, out) == (2, b"")
        assert err.startswith(b"sipit: bad: ")


def test_any_model_drops_the_fingerprint(run: Run, text_folder: Path, tmp_path: Path) -> None:
    run("capture", "--text", "moved", "--layer", "1", "--out", "seen", "--model", text_folder)
    assert run("invert", "seen", "--dtype", "float64")[0] == 2
    code, out, _ = run("invert", "seen", "--dtype", "float64", "--any-model", "--policy", "likely")
    assert (code, out) in ((0, b"moved"), (1, b""))  # float64 may differ from float32 by more than its own noise


@pytest.mark.thorough
def test_quantised_states_are_inverted_by_the_model_quantised_alike(run: Run, text_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run("capture", "--text", "small", "--layer", "2", "--out", "seen", "--model", text_folder, "--quantize", "nf4")
    code, out, err = run("invert", "seen", "--quantize", "nf4")
    assert (code, out) == (0, b"small")
    assert run("invert", "seen")[0] == 2  # the plain model is another
    code, out, err = run("capture", "--text", "x", "--layer", "2", "--out", "other", "--quantize", "int4")
    assert code == 2
    assert b"int8-vectorwise" in err


@pytest.mark.parametrize("bos", [False, True])
def test_demo_recovers_its_paragraph_whatever_the_tokenizer_adds(
    run: Run, text_folder: Path, bos_folder: Path, bos: bool
) -> None:
    code, out, err = run("demo", "--model", bos_folder if bos else text_folder)
    assert b"Dear Maria" in out
    assert b"exact     yes" in err
    assert code == 0


def test_live_display_keeps_standard_output_clean(run: Run, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("capture", "--text", "[red]live[/red]", "--layer", "1", "--out", "seen", "--model", text_folder)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    code, out, err = run("invert", "seen")
    assert (code, out) == (0, b"[red]live[/red]")
    assert b"tokens" in err


def test_version_and_help_exit_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in ((["--version"], "sipit 0."), (["--help"], "capture"), (["invert", "--help"], "Verdicts")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert part in capsys.readouterr().out


def test_interrupt_before_the_search_exits_with_130(
    run: Run, monkeypatch: pytest.MonkeyPatch, text_folder: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sipit.models.load", interrupted)
    code, out, err = run("capture", "--text", "a", "--layer", "1", "--out", "seen", "--model", text_folder)
    assert (code, out, err) == (130, b"", b"sipit: interrupted\n")


@pytest.mark.thorough
def test_ctrl_c_prints_the_recovered_prefix_and_exits_with_130(tmp_path: Path, text_folder: Path) -> None:
    text = "x" * 200  # long, and in an order that needs many passes a token
    lm = sipit.load(text_folder)
    sipit.write_observation(lm.capture(text, layer=3), tmp_path / "seen")
    # a progress line after every step, so that the test knows when something was recovered; a test run
    # started in the background hands on an ignored SIGINT, which no terminal would
    code = (
        "import signal, sys, sipit.cli.display as d, sipit.cli; d._LINE_SECONDS = 0.0; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(sipit.cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "invert", str(tmp_path / "seen"), "--policy", "gradient"]
    json_path = tmp_path / "c.json"
    process = subprocess.Popen(
        [*command, "--json", str(json_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    try:
        assert process.stderr is not None
        _wait_for(process.stderr.fileno(), b"3/200 tokens")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert 3 <= len(out) < 200
    assert out == b"x" * len(out)
    assert f"stopped after {len(out)} of 200 tokens".encode() in err
    assert b"Traceback" not in err
    assert not json_path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["seen"]


def _wait_for(descriptor: int, text: bytes) -> None:
    """Read a pipe until `text` has come by."""
    seen, end = b"", time.monotonic() + 120
    while text not in seen:
        assert select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0], seen
        part = os.read(descriptor, 4096)
        assert part, seen
        seen += part


@pytest.mark.thorough
def test_reader_that_goes_away_is_no_traceback(tmp_path: Path, text_folder: Path) -> None:
    lm = sipit.load(text_folder)
    sipit.write_observation(lm.capture("unread", layer=1), tmp_path / "seen")
    code = "import sys, sipit.cli; sys.exit(sipit.cli.main(sys.argv[1:]))"
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-c", code, "invert", str(tmp_path / "seen")],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert process.returncode not in (0, 120)
    assert b"Traceback" not in process.stderr
    assert b"Exception ignored" not in process.stderr


def test_module_runs_as_the_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "sipit", "--version"], capture_output=True, check=False)
    assert (done.returncode, done.stdout[:6]) == (0, b"sipit ")


@pytest.mark.parametrize(
    ("arguments", "named", "help_of"),
    [
        (["invret", "seen"], b"'invert'", b"sipit --help"),
        (["--versoin"], b"'--version'", b"sipit --help"),
        (["capture", "--layr", "2"], b"'--layer'", b"sipit capture --help"),
        (["invert", "seen", "--polcy=auto"], b"'--policy'", b"sipit invert --help"),
        (["invert", "seen", "--exh"], b"no option '--exh'", b"sipit invert --help"),  # no abbreviations
        (["collisions", "survy"], b"'survey'", b"sipit collisions --help"),
        (["collisions", "survey", "--foldr", "x"], b"'--folder'", b"sipit collisions survey --help"),
    ],
)
def test_misspelt_word_names_its_nearest_neighbour(
    run: Run, arguments: list[str], named: bytes, help_of: bytes
) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count(b"\n")) == (2, b"", 1)
    assert named in err
    assert help_of in err


@pytest.mark.thorough
def test_values_may_begin_with_dashes(run: Run, text_folder: Path) -> None:
    model = ("--model", text_folder, "--layer", "1", "--out", "seen")
    assert run("capture", "--text=--quoted", *model)[0] == 0
    assert run("invert", "seen")[:2] == (0, b"--quoted")
    assert run("capture", "--text", "--two words", *model)[0] == 0
    assert run("invert", "seen")[:2] == (0, b"--two words")


@pytest.mark.thorough
def test_layer_final_is_taken_by_capture_and_demo(run: Run, text_folder: Path) -> None:
    assert run("capture", "--text", "end", "--layer", "final", "--out", "seen", "--model", text_folder)[0] == 0
    assert sipit.read_observation("seen").site == "final"
    assert run("invert", "seen")[:2] == (0, b"end")
    code, _, err = run("demo", "--layer", "final", "--model", text_folder)
    assert code == 0
    assert b"final norm" in err


def test_no_time_left_is_told_before_something_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    from sipit.cli.display import CountDisplay, _line
    from sipit.inversion import Progress
    from sipit.inversion.fitting import FitProgress

    class Shown(CountDisplay):
        lines: list[str] = []  # noqa: RUF012

        def _show(self, line: str, text: str | None = None) -> None:
            self.lines.append(line)

    def line_after(*input_ids: int) -> str:
        return _line(Progress(input_ids=input_ids, seq_len=9, n_checked=40, n_passes=4, block_tokens=0, seconds=3.0))

    assert "left" not in line_after()
    assert "about 24 s left" in line_after(5)
    display = Shown(0)
    display.fitting(FitProgress(phase="capture", done=0, total=10, seconds=3.0))
    display.fitting(FitProgress(phase="capture", done=1, total=10, seconds=3.0))
    assert Shown.lines == ["capture: 0 %", "capture: 10 %, about 27 s left"]


@pytest.mark.thorough
def test_check_loads_the_dtype_that_the_record_names(run: Run, text_folder: Path) -> None:
    run("capture", "--text", "wide", "--layer", "1", "--out", "seen", "--model", text_folder, "--dtype", "float64")
    assert run("invert", "seen", "--dtype", "float64", "--json", "c.json")[0] == 0
    assert run("check", "c.json", "seen")[0] == 0
    assert run("check", "c.json", "seen", "--dtype", "float32")[0] == 1
    assert run("check", "c.json", "seen", "--dtype", "auto")[0] == 1


@pytest.mark.thorough
def test_demo_ends_with_commands_that_run(run: Run, text_folder: Path) -> None:
    _, _, err = run("demo", "--model", text_folder)
    capture, invert = (line.partition("sipit ")[2] for line in err.decode().rstrip("\n").split("\n")[-2:])
    assert run(*shlex.split(capture))[0] == 0
    assert run(*shlex.split(invert))[:2] == (0, b"your own text")


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--layer", "two"],
        ["capture", "--text", "a", "--layer", "fnal", "--out", "o"],
        ["capture", "--text", "a", "--out", "o"],
        ["capture", "--text", "a", "--site", "blok", "--layer", "1", "--out", "o"],
        ["capture", "--text", "a", "--layer", "1", "--out", "missing/o"],
        ["fit", "--layer", "-1"],
        ["bench", "--layer", "1.5", "--random-ids"],
        ["bench", "--layer", "1", "--random-ids", "--json", "missing/o"],
        ["collisions", "survey", "--folder", "f", "--layer", "two"],
        ["collisions", "survey", "--folder", "f", "--lengths", "four"],
        ["collisions", "margins", "--log", "missing/log"],
        ["collisions", "families", "--survey", "missing"],
        ["collisions", "continuations", "--survey", "missing"],
        ["invert", "missing"],
        ["invert", "seen", "--resume", "missing/prefix"],
        ["invert", "seen", "--json", "missing/o"],
        ["invert", "seen", "--noise", "-1"],
        ["invert", "seen", "--max-batch", "0"],
        ["check", "missing", "seen"],
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    run: Run, tmp_path: Path, text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sipit.models.load", loaded)
    sipit.write_observation(text_lm.capture("seen", layer=1), tmp_path / "seen")
    code, out, err = run(*arguments)
    assert (code, out, err.count(b"\n")) == (2, b"", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seen"]


@pytest.mark.thorough
def test_prompt_from_its_last_state_alone(run: Run, tmp_path: Path, text_folder: Path) -> None:
    code, _, err = run("capture", "--text", "ab", "--last", "--layer", "2", "--out", "seen", "--model", text_folder)
    assert code == 0
    assert b"1 states" in err
    code, out, err = run("invert", "seen", "--max-tokens", "3", "--no-fit", "--json", "c.json")
    assert (code, out) == (0, b"ab")
    assert b"verdict   recovered" in err
    assert run("check", "c.json", "seen")[0] == 0
    code, out, err = run("invert", "seen", "--length", "1", "--seconds", "1", "--no-fit", "--json", "miss.json")
    assert (code, out) == (1, b"")
    assert b"unmatched: no prompt of 1 tokens was found within 1 s" in err
    code, _, err = run("invert", "seen", "--exhaustive")
    assert code == 2
    assert b"--exhaustive has no meaning" in err
    code, _, err = run("invert", "seen", "--max-tokens", "0")
    assert code == 2
