"""The commands under `sipit collisions` end to end: records against brute force, going on, refusals without a trace."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel
from sipit.cli import main
from sipit.collisions import StateFolder
from sipit.observations import Cut

Run = Callable[..., tuple[int, str, str]]

PROSE = "The quick brown fox jumps over the lazy dog; 12 wizards vex him. "
TEXT = "Sum of 2 parts. It is 1."
CORPUS = ("--corpus", "texts", "--prompts", "18", "--per-text", "10", "--lengths", "2,3,4")
SURVEY = ("collisions", "survey", *CORPUS, "--shard", "5", "--k", "3")
LAYERS = [(1, "block"), (2, "block"), (3, "block"), (3, "final")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text_folder: Path) -> Run:
    """Run a command in a folder that holds a corpus, with the tiny text model where none is named."""
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "prose.txt").write_text(PROSE, encoding="utf-8")
    for letter in "abcd":
        (texts / f"{letter}.txt").write_text(letter * 64, encoding="utf-8")

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        model = [] if "--model" in arguments else ["--model", str(text_folder)]
        code = main([*map(str, arguments), *model])
        return code, *capfd.readouterr()

    return command


def record_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(name).read_text("utf-8"))
    return found


def last(lm: LanguageModel, prompts: Iterable[Tensor], layer: int, site: str) -> Tensor:
    """Return last-token states by one ordinary forward pass each. (N, D) float64."""
    cut = lm.cut(Cut(layer, site))  # type: ignore[arg-type]
    return torch.stack([cut.ordinary(ids)[-1] for ids in prompts]).double()


def continued(lm: LanguageModel, prefix: list[int], layer: int) -> Tensor:
    """Return the states of every next token behind a prefix by ordinary passes. (V, D)."""
    return last(lm, (torch.tensor([*prefix, token]) for token in range(lm.vocab_size)), layer, "block")


def without_times(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in layer.items() if key != "seconds"} for layer in layers]


@pytest.mark.thorough
def test_survey_record_agrees_with_brute_force(run: Run, text_lm: LanguageModel) -> None:
    code, out, err = run(*SURVEY, "--folder", "s", "--json", "s.json", "--figure", "s.svg", "--full")
    assert code == 0
    assert len(out.splitlines()) == 1 + len(LAYERS)
    assert err == "612 pairs in 4 layers: 0 at distance 1e-06 or nearer\n"
    record = record_of("s.json")
    assert {"sipit", "torch", "threads", "model", "fingerprint", "device", "dtype", "made"} < set(record)
    assert record["source"]["lengths"] == [2, 3, 4]
    assert record["n_prompts"] == 18
    prompts = list(StateFolder("s").prompts())
    for layer, cut in zip(record["layers"], LAYERS, strict=True):
        assert (layer["layer"], layer["site"], layer["n_pairs"]) == (*cut, 18 * 17 // 2)
        states = last(text_lm, prompts, *cut)
        every = torch.pdist(states).sort().values
        assert [pair["distance"] for pair in layer["closest"]] == pytest.approx(every[:3].tolist(), rel=1e-4, abs=2e-5)
        assert layer["farthest"] == pytest.approx(float(every[-1]), rel=1e-5)
        assert layer["spread"]["is_sampled"] is False
        for pair in layer["closest"]:
            for end in ("first", "second"):
                assert pair[f"{end}_ids"] == prompts[pair[end]].tolist()
                assert pair[f"{end}_text"] == text_lm.decode(prompts[pair[end]])
        by_length = {part["length"]: part["least"] for part in layer["by_length"]}
        for length, least in by_length.items():
            alike = states[[len(ids) == length for ids in prompts]]
            assert least == pytest.approx(float(torch.pdist(alike).min()), rel=1e-4)
    assert Path("s.svg").read_bytes().startswith(b"<?xml")


def test_prompts_of_one_repeated_token_are_told_from_close_ones(run: Run) -> None:
    run(*SURVEY, "--folder", "s", "--json", "s.json")
    for layer in record_of("s.json")["layers"]:
        near, rest = layer["closest"][0], layer["closest_varied"][0]
        assert len(set(near["first_text"] + near["second_text"])) == 1
        assert near["float64_distance"] < 1e-12 < near["distance"] < 1e-4
        assert len(set(rest["first_text"] + rest["second_text"])) > 1
        assert rest["float64_distance"] == pytest.approx(rest["distance"], rel=1e-4)


def test_second_survey_prints_the_same_and_searches_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(*SURVEY, "--folder", "s", "--json", "1.json")
    before = {path: path.read_bytes() for path in Path("s").iterdir()}

    def searched(*_: Any, **__: Any) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(importlib.import_module("sipit.collisions.survey"), "search_pairs", searched)
    monkeypatch.setattr(importlib.import_module("sipit.collisions.capture"), "last_states", searched)
    assert run(*SURVEY, "--folder", "s", "--json", "2.json") == first
    assert {path: path.read_bytes() for path in Path("s").iterdir()} == before
    assert record_of("1.json")["layers"] == record_of("2.json")["layers"]


def interrupting(monkeypatch: pytest.MonkeyPatch, module: str, name: str, *, after: int) -> list[int]:
    """Let a function of the package be interrupted after some calls, once; return the list of its calls."""
    home = importlib.import_module(f"sipit.collisions.{module}")
    real = getattr(home, name)
    calls: list[int] = []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(home, name, stopping)
    return calls


def test_interrupted_capture_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*SURVEY, "--folder", "whole", "--json", "whole.json")
    calls = interrupting(monkeypatch, "capture", "last_states", after=2)  # of four shards
    assert run(*SURVEY, "--folder", "s", "--json", "s.json") == (130, "", "sipit: interrupted\n")
    assert sorted(path.name for path in Path("s").iterdir()) == [
        *("manifest.json", "states-00000.safetensors", "states-00001.safetensors"),
    ]
    assert not Path("s.json").exists()
    assert run(*SURVEY, "--folder", "s", "--json", "s.json")[0] == 0
    assert len(calls) == 2 + 1 + 2
    assert without_times(record_of("s.json")["layers"]) == without_times(record_of("whole.json")["layers"])


def test_interrupted_search_goes_on_with_the_next_layer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*SURVEY, "--folder", "whole", "--json", "whole.json")
    calls = interrupting(monkeypatch, "survey", "sampled_spread", after=5)  # four a layer: all, and three lengths
    assert run(*SURVEY, "--folder", "s", "--json", "s.json")[0] == 130
    kept = Path("s/survey.jsonl").read_bytes()
    assert kept.count(b"\n") == 1
    assert not Path("s.json").exists()
    assert run(*SURVEY, "--folder", "s", "--json", "s.json")[0] == 0
    assert Path("s/survey.jsonl").read_bytes().startswith(kept)
    assert len(calls) == 6 + 3 * 4
    assert without_times(record_of("s.json")["layers"]) == without_times(record_of("whole.json")["layers"])


def test_continuations_agree_with_brute_force(run: Run, text_lm: LanguageModel) -> None:
    code, out, _ = run(
        *("collisions", "continuations", "--folder", "k", "--text", "ab", "--text", "cd", "--layer", "3"),
        *("--json", "k.json", "--threshold", "6"),
    )
    assert code == 0
    assert len(out.splitlines()) == 2
    record = record_of("k.json")
    assert record["prefixes"] == ["ab", "cd"]
    (layer,) = record["layers"]
    states = [continued(text_lm, text_lm.encode(prefix).tolist(), 3) for prefix in ("ab", "cd")]
    inner = [torch.pdist(rows) for rows in states]
    across = (states[0][:, None] - states[1]).norm(dim=2)
    assert layer["least_by_prefix"] == pytest.approx([float(part.min()) for part in inner], rel=1e-5)
    for found, distances in ((layer["within"], torch.cat(inner)), (layer["across"], across)):
        assert found["n_pairs"] == distances.numel()
        assert found["n_collisions"] == int((distances <= 6).sum())
        assert found["closest"]["distance"] == pytest.approx(float(distances.min()), rel=1e-5)
        assert found["closest"]["ordinary_distance"] == pytest.approx(found["closest"]["distance"], rel=1e-4)
    assert layer["within"]["n_collisions"] > 0


def test_continuations_start_from_the_closest_prompts_of_a_survey(run: Run, text_lm: LanguageModel) -> None:
    run(*SURVEY, "--folder", "s", "--json", "s.json", "--layer", "2")
    arguments = ("collisions", "continuations", "--folder", "k", "--survey", "s", "--prefixes", "3", "--layer", "2")
    assert run(*arguments, "--json", "k.json")[0] == 0
    record, near = record_of("k.json"), record_of("s.json")["layers"][0]["closest_varied"][0]
    assert record["prefixes"][:2] == [near["first_text"], near["second_text"]]
    assert len(set(record["prefixes"])) == 3
    assert record["layers"][0]["n_tokens"] == text_lm.vocab_size


@pytest.mark.thorough
def test_margins_agree_with_brute_force(run: Run, text_lm: LanguageModel) -> None:
    corpus = (*CORPUS, "--prompts", "4", "--layer", "2")
    run("collisions", "survey", *corpus, "--folder", "s")  # keeps the prompts
    assert run("collisions", "margins", *corpus, "--tokens", "0", "--json", "all.json")[0] == 0
    some = ("--tokens", "20", "--exhaustive", "1")
    code, out, _ = run("collisions", "margins", *corpus, *some, "--json", "some.json")
    assert code == 0
    assert len(out.splitlines()) == 2
    (whole,), (sampled,) = (record_of(name)["layers"] for name in ("all.json", "some.json"))
    assert (whole["n_tokens"], whole["is_whole_vocabulary"]) == (text_lm.vocab_size, True)
    assert (sampled["n_tokens"], sampled["is_whole_vocabulary"]) == (20, False)
    states = {tuple(ids.tolist()): continued(text_lm, ids.tolist(), 2) for ids in StateFolder("s").prompts()}
    expected = {prefix: float(torch.pdist(rows).min()) for prefix, rows in states.items()}
    assert whole["least"] == pytest.approx(min(expected.values()), rel=1e-5)
    assert whole["mean"] == pytest.approx(sum(expected.values()) / 4, rel=1e-5)
    prefix, (one, two) = tuple(whole["least_prefix"]), whole["least_tokens"]
    assert expected[prefix] == min(expected.values())
    assert float((states[prefix][one] - states[prefix][two]).norm()) == pytest.approx(whole["least"], rel=1e-5)
    assert sampled["least"] >= whole["least"] * (1 - 1e-5)
    assert run("collisions", "margins", *corpus, "--tokens", "20", "--pick", "random", "--json", "any.json")[0] == 0
    assert record_of("any.json")["layers"][0]["least"] > whole["least"] * (1 + 1e-5)
    (exact,) = sampled["exact"]
    assert exact["distance"] == pytest.approx(expected[tuple(exact["prefix"])], rel=1e-5)
    assert f"{exact['bound'] / exact['distance']:.4g}" in out
    assert (sampled["pick"], whole["exact"]) == ("near", [])


def test_families_tell_rounding_from_distance(run: Run) -> None:
    arguments = ("collisions", "families", "--text", TEXT, "--longest", "6", "--layer", "2", "--climb", "1")
    code, out, err = run(*arguments, "--json", "f.json")
    assert code == 0
    assert "1 of these closest pairs have the same state in exact arithmetic" in err
    record = record_of("f.json")
    families = {family["family"]: family for family in record["families"]}
    repeated = families.pop("repeated_token")
    assert repeated["float64_distance"] < 1e-12 < repeated["pairs"][0]["distance"]
    for family in families.values():
        assert family["float64_distance"] == pytest.approx(family["pairs"][0]["distance"], rel=1e-4)
    assert [climb["family"] for climb in record["climbs"]] == list(families)
    for found in record["climbs"]:
        assert found["relative_to_norm"] <= families[found["family"]]["pairs"][0]["relative_to_norm"] * (1 + 1e-4)
        assert found["first_ids"] != found["second_ids"]
    assert len(out.splitlines()) == 1 + len(record["families"]) + len(record["climbs"])


def test_families_and_climbs_start_from_the_closest_prompts_of_a_survey(run: Run, text_lm: LanguageModel) -> None:
    run(*SURVEY, "--folder", "s", "--json", "s.json", "--layer", "1", "--layer", "2")
    arguments = ("collisions", "families", "--survey", "s", "--longest", "3", "--layer", "1", "--layer", "2")
    code, out, _ = run(*arguments, "--climb", "1", "--pairs", "2", "--json", "f.json")
    assert code == 0
    record = record_of("f.json")
    surveyed = {layer["layer"]: layer["closest_varied"] for layer in record_of("s.json")["layers"]}
    near = surveyed[2][0]
    assert record["texts"] == [near["first_text"], near["second_text"]]
    assert record["survey"]["name"] == "texts"
    orders = next(x for x in record["families"] if (x["family"], x["layer"]) == ("sample_order", 2))
    assert (len(record["similar"]), orders["n_prompts"]) == (5, 120)
    assert [(x["family"], x["layer"]) for x in record["climbs"]] == [("survey", layer) for layer in (1, 1, 2, 2)]
    starts = [x["steps"][0] for x in record["climbs"]]
    for start, pair in zip(starts, [*surveyed[1][:2], *surveyed[2][:2]], strict=True):
        assert [start["first_ids"], start["second_ids"]] == [pair["first_ids"], pair["second_ids"]]
        assert start["distance"] == pytest.approx(pair["distance"], rel=1e-4)
    assert out.count("climb from survey") == 4


@pytest.mark.thorough
def test_constructed_cases_go_as_expected_and_else_exit_with_one(run: Run) -> None:
    code, out, err = run("collisions", "constructed", "--tiny", "--json", "c.json")
    assert (code, err) == (0, "")
    cases = record_of("c.json")["cases"]
    assert all(case["found"] == (case["expected"] == "collides") for case in cases)
    assert {case["expected"] for case in cases} == {"collides", "does not"}
    assert out.count("(as expected)") == len(cases)
    code, out, _ = run("collisions", "constructed", "--tiny", "--threshold", "1e6")
    assert code == 1
    assert "control, layer 1: collides (NOT as expected)" in out


def test_precision_measures_the_same_prompts_under_each(run: Run, text_lm: LanguageModel) -> None:
    code, out, _ = run("collisions", "precision", *CORPUS, "--layer", "2", "--json", "p.json")
    assert code == 0
    results = record_of("p.json")["results"]
    assert [result["precision"] for result in results] == ["float32", "bfloat16", "int8", "int4"]
    assert {result["n_pairs"] for result in results} == {18 * 17 // 2}
    errors = [result["weight_error"] for result in results]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert len(out.splitlines()) == 1 + 4


@pytest.mark.thorough
def test_real_quantisers_stand_beside_the_simulated_ones(run: Run) -> None:
    pytest.importorskip("bitsandbytes")
    names = ["bnb-int8", "int8", "bnb-nf4"]
    chosen = [word for name in names for word in ("--precision", name)]
    assert run("collisions", "precision", *CORPUS, "--layer", "2", *chosen, "--json", "p.json")[0] == 0
    assert [result["precision"] for result in record_of("p.json")["results"]] == names
    code, _, err = run("collisions", "precision", *CORPUS, "--layer", "2", "--precision", "int3")
    assert (code, "bnb-nf4" in err) == (2, True)


@pytest.mark.thorough
def test_survey_of_a_quantised_model_says_so(run: Run) -> None:
    pytest.importorskip("bitsandbytes")
    arguments = ("collisions", "survey", "--folder", "s", *CORPUS, "--layer", "2", "--quantize", "int8")
    assert run(*arguments, "--json", "s.json")[0] == 0
    assert record_of("s.json")["quantize"] == "int8"
    code, _, err = run("collisions", "continuations", "--folder", "c", "--survey", "s", "--layer", "2")
    assert (code, "name the model it was made with" in err) == (2, True)
    code, _, err = run("collisions", "margins", *CORPUS, "--layer", "2", "--quantize", "int8-vectorwise")
    assert (code, "rounds activations to int8" in err) == (2, True)


def test_precision_of_families_leaves_out_what_is_equal_in_exact_arithmetic(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = importlib.import_module("sipit.collisions.families")
    monkeypatch.setattr(families, "sample_texts", lambda **_: [TEXT])  # the library's take seconds to read
    arguments = ("collisions", "precision", "--families", "--prompts", "999", "--layer", "2", "--json", "p.json")
    assert run(*arguments)[0] == 0
    record = record_of("p.json")
    assert 100 < record["n_prompts"] < 999  # all there are
    assert record["results"][0]["distance"] > 1e-2


REFUSED = [
    (("survey", "--folder", "n", "--lengths", "4,x"), "--lengths takes numbers of tokens"),
    (("survey", "--folder", "n", "--lengths", ""), "--lengths takes numbers of tokens"),
    (("survey", "--folder", "n", "--lengths", "0"), "lengths are [0]"),
    (("survey", "--folder", "n", "--corpus", "nonsense"), "'nonsense' is neither a corpus nor a path"),
    (("survey", "--folder", "n", "--revision", "main"), "no revisions"),
    (("survey", "--folder", "n", "--prompts", "5000"), "ask for fewer prompts"),
    (("survey", "--folder", "n", "--layer", "9"), "layer 9 is out of range"),
    (("survey", "--folder", "n", "--layer", "x"), "--layer takes a number of blocks or 'final'"),
    (("survey", "--folder", "texts/a.txt"), "cannot make the folder"),
    (("continuations", "--folder", "n"), "continuations need prefixes"),
    (("continuations", "--folder", "n", "--text", "a", "--survey", "texts"), "continuations need prefixes"),
    (("continuations", "--folder", "n", "--text", ""), "the prompt is empty"),
    (("continuations", "--folder", "n", "--text", "a", "--text", "a"), "must be different prompts"),
    (("continuations", "--folder", "n", "--text", "a", "--layer", "0"), "layers of 1 or more"),
    (("continuations", "--folder", "n", "--survey", "none"), "none holds no manifest.json"),
    (("continuations", "--folder", "n", "--survey", "texts"), "texts holds no manifest.json"),
    (("margins", *CORPUS, "--layer", "0"), "layers of 1 or more"),
    (("margins", *CORPUS, "--tokens", "1"), "at least 2 next tokens"),
    (("families", "--text", TEXT, "--longest", "1"), "--longest must be at least 2"),
    (("families", "--text", TEXT, "--survey", "s"), "not from both"),
    (("families", "--text", TEXT, "--pairs", "0"), "--pairs at least 1"),
    (("families", "--text", TEXT, "--threshold", "-1"), "threshold of 0 or more"),
    (("precision", *CORPUS, "--layer", "4"), "layer 4 is out of range"),
    (("constructed", "--tiny", "--threshold", "nan"), "threshold of 0 or more"),
]


@pytest.mark.parametrize(("arguments", "part"), REFUSED)
def test_wrong_argument_is_refused_in_one_sentence_and_leaves_nothing(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    corpus = CORPUS if arguments[0] == "survey" else ()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("collisions", arguments[0], *corpus, *arguments[1:], "--json", "out.json")
    assert (code, out) == (2, "")
    assert err.startswith("sipit: ")
    assert err.count("\n") == 1
    assert part in err
    assert sorted(tmp_path.rglob("*")) == before


EARLY = [
    (("survey", "--folder", "n", "--memory", "0"), "--memory is 0.0 GiB"),
    (("survey", "--folder", "n", "--threshold", "nan"), "--threshold is nan"),
    (("survey", "--folder", "n", "--k", "0"), "--k and --shard must be at least 1"),
    (("survey", "--folder", "n", "--shard", "0"), "--k and --shard must be at least 1"),
    (("survey", "--folder", "n", "--figure", "none/f.svg"), "cannot write none/f.svg"),
    (("continuations", "--folder", "n", "--text", "a", "--memory", "nan"), "--memory is nan GiB"),
    (("continuations", "--folder", "n", "--text", "a", "--threshold", "-1"), "--threshold is -1.0"),
    *(
        ((*command, "--json", "none/out.json"), "cannot write none/out.json")
        for command in (
            ("survey", "--folder", "n"),
            ("continuations", "--folder", "n", "--text", "a"),
            ("margins",),
            ("families",),
            ("constructed",),
            ("precision",),
        )
    ),
]


@pytest.mark.parametrize(("arguments", "part"), EARLY)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("collisions", *arguments, "--model", "no-model-here")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_of_another_survey_is_refused_untouched(run: Run) -> None:
    run(*SURVEY, "--folder", "s")
    before = {path: path.read_bytes() for path in Path("s").iterdir()}
    code, out, err = run(*SURVEY, "--folder", "s", "--prompts", "12", "--json", "s.json")
    assert (code, out) == (2, "")
    assert "holds a capture with another prompts sha256" in err
    assert {path: path.read_bytes() for path in Path("s").iterdir()} == before
    assert not Path("s.json").exists()


def test_damaged_log_of_searches_is_refused_untouched(run: Run) -> None:
    run(*SURVEY, "--folder", "s")
    log = Path("s/survey.jsonl")
    log.write_bytes(b"not a record\n")
    code, out, err = run(*SURVEY, "--folder", "s")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "survey.jsonl is there and is not a file of JSON lines" in err
    assert log.read_bytes() == b"not a record\n"
