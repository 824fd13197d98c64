"""The page of a reproduction: each model judged by itself, our numbers beside the paper's, nothing said twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sipit.cli import main
from sipit.experiments.catalogue import EXPERIMENTS
from sipit.report.comparisons import ours
from sipit.report.judges import Kind, judge, worst
from sipit.report.reproduction import judged, reproduction_page

_ROOT = Path(__file__).parents[3]
_HEAD = {"fingerprint": "f", "dtype": "float32", "device": "cpu", "threads": 1, "torch": "2", "seconds": 1.0}
_PRICE = {"n_prompts": 2, "n_exact": 2, "site": "block", "wall_ratio": 2.0, "seconds_deviation": 0.1}


def _record(name: str, values: dict[str, Any], *, model: str = "m", scale: str = "small") -> dict[str, Any]:
    key = str(sorted(values.items()))
    return {**_HEAD, "experiment": name, "model": model, "scale": scale, "command": "c", "key": key, "values": values}


def _margin(layer: int, least: float) -> dict[str, Any]:
    about = {"site": "block", "n_prefixes": 5, "n_tokens": 7, "mean": least, "median_relative_to_norm": 0.1}
    return {"layer": layer, "least": least, **about}


def _row(text: str, name: str) -> str:
    found = re.search(rf'<tr><td><a href="#{name}">.*?</tr>', text)
    assert found is not None
    return found[0]


def test_models_are_judged_apart_and_the_claim_by_the_weaker() -> None:
    rising = [_record("margins", _margin(layer, least), model="a") for layer, least in ((1, 5.0), (9, 7.0))]
    lower = [_record("margins", _margin(layer, least), model="b") for layer, least in ((1, 1.0), (9, 2.0))]
    row = _row(reproduction_page([*rising, *lower], EXPERIMENTS), "margins")
    assert 'class="held">held<' in row
    assert row.count("it rises with the layer") == 2
    falling = [_record("margins", _margin(layer, least), model="b") for layer, least in ((1, 2.0), (9, 1.0))]
    row = _row(reproduction_page([*rising, *falling], EXPERIMENTS), "margins")
    assert 'class="limit">held with this limit<' in row
    assert "<br>b: Least margin" in row


def test_scales_are_judged_apart() -> None:
    records = [_record("margins", _margin(1, 1.0), scale="smoke"), _record("margins", _margin(1, 3.0))]
    assert "m, smoke: Least margin" in _row(reproduction_page(records, EXPERIMENTS), "margins")


def test_what_all_rows_share_is_said_once() -> None:
    text = reproduction_page([_record("margins", _margin(layer, 2.0 + layer)) for layer in (1, 9)], EXPERIMENTS)
    assert "The same in every row: prefixes = 5; next tokens = 7; median over the norm = 0.1." in text
    assert "<th" in text
    assert "prefixes</th>" not in text.split('id="margins"')[1].split("<h2")[0]


def test_a_table_whose_rows_agree_in_everything_still_shows_it() -> None:
    values = [{"dtype": dtype, "layer": 1, "n_prompts": 5, "n_exact": 5} for dtype in ("float32", "float16")]
    text = reproduction_page([_record("stored-dtypes", each) for each in values], EXPERIMENTS)
    section = text.split('id="stored-dtypes"')[1].split("<h2")[0]
    assert section.count('data-value="5"') == 4
    assert "The same in every row" not in section


def test_a_refusal_limits_what_else_held() -> None:
    done = {"dtype": "float32", "layer": 1, "n_prompts": 5, "n_exact": 5}
    records = [_record("stored-dtypes", done), _record("stored-dtypes", {"refused": "it overflows"})]
    row = _row(reproduction_page(records, EXPERIMENTS), "stored-dtypes")
    assert 'class="limit">' in row
    assert "5 of 5 exact." in row
    assert "was refused: it overflows." in row


def test_refused_records_are_said_to_be() -> None:
    text = reproduction_page([_record("margins", {"refused": "no <tokenizer>"})], EXPERIMENTS)
    assert "no &lt;tokenizer&gt;" in text
    assert 'class="open">not tested here<' in _row(text, "margins")


def test_our_rows_have_a_number_for_each_of_the_papers_columns() -> None:
    committed: dict[str, list[dict[str, Any]]] = {}
    for name in EXPERIMENTS:
        lines = (_ROOT / "results" / f"{name}.jsonl").read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        committed[name] = [{**r["values"], "key": r["key"]} for r in records if r["model"] == "smollm2-135m"]
    compared = {name: one.paper_table for name, one in EXPERIMENTS.items() if one.paper_table is not None}
    assert {"distances", "precision", "continuations", "inversion"} <= set(compared)
    for name, numbers in compared.items():
        rows = ours(name, committed[name])
        assert rows
        assert {len(shown) for _, shown in (*rows, *numbers.rows)} == {len(numbers.columns)}


def test_the_committed_page_is_that_of_the_committed_records(tmp_path: Path) -> None:
    assert main(["report", str(_ROOT / "results"), "--out", str(tmp_path / "page.html")]) == 0
    committed = (_ROOT / "docs" / "reproduction.html").read_bytes()
    assert (tmp_path / "page.html").read_bytes() == committed, "make it again: sipit report results --out docs/…"


def paper_table_rows() -> list[str]:
    """Return the rows of the table in docs/figures.md that the committed records give."""
    files = [_ROOT / "results" / f"{name}.jsonl" for name in EXPERIMENTS]
    records = [json.loads(line) for path in files for line in path.read_text("utf-8").splitlines()]
    return [
        f"| {one.claim.answers} | `{one.claim.name}` | {one.verdict} | {'<br>'.join(one.sentences)} |"
        for one in judged(records, EXPERIMENTS)
    ]


def test_the_docs_quote_the_committed_records() -> None:
    quoted = (_ROOT / "docs" / "figures.md").read_text("utf-8")
    assert [row for row in paper_table_rows() if row not in quoted] == []


def _timed(seconds: list[float]) -> list[dict[str, Any]]:
    return [{**_PRICE, "layer": n, "seq_len": 20, "seconds": each} for n, each in enumerate(seconds)]


@pytest.mark.parametrize(("seconds", "kind"), [([1.0, 1.9], "held"), ([1.0, 2.1], "limit")])
def test_time_hardly_depends_on_the_layer_up_to_twice(seconds: list[float], kind: Kind) -> None:
    assert judge("time-by-layer", _timed(seconds))[0] == kind


def _run(method: str, exact: bool) -> dict[str, Any]:
    return {"method": method, "exact": exact, "seconds": 1.0, "time_limit": 20.0}


def test_hard_prompts_that_are_right_once_limit_the_claim() -> None:
    ours_right, never = _run("auto", True), _run("hard-prompts", False)
    assert judge("inversion", [ours_right, never])[0] == "held"
    assert judge("inversion", [ours_right, never, _run("hard-prompts", True)])[0] == "limit"
    assert judge("inversion", [_run("auto", False), never])[0] == "wrong"


def test_an_inversion_that_ran_out_of_time_limits_the_claim_and_refutes_nothing() -> None:
    stopped = {**_run("auto", False), "verdict": "stopped"}
    kind, says = judge("inversion", [_run("auto", True), stopped])
    assert (kind, "1 of ours had to stop before they were done" in says) == ("limit", True)


@pytest.mark.parametrize(("least", "varied", "kind"), [(0.5, 0.5, "held"), (0.0, 0.5, "limit"), (0.0, 1e-9, "wrong")])
def test_a_collision_that_only_float64_shows_is_not_passed_over(least: float, varied: float, kind: Kind) -> None:
    values = {"n_pairs": 10, "n_collisions": 0, "threshold": 1e-6, "least_float64": least}
    assert judge("distances", [{**values, "least_varied_float64": varied}])[0] == kind


def test_doubling_under_4_bits_is_checked() -> None:
    def values(least: float) -> list[dict[str, Any]]:
        gaps = {"float32": 1.0, "int4": least}
        return [{"precision": name, "distance": gap, "n_collisions": 0} for name, gap in gaps.items()]

    assert judge("precision", values(2.1))[0] == "held"
    kind, says = judge("precision", values(1.5))
    assert (kind, "1.5 times, not more than double" in says) == ("limit", True)


def test_equal_rows_limit_the_claim_on_next_tokens() -> None:
    values = {"within": {"n_collisions": 0, "n_pairs": 10}, "least_by_prefix": [0.5], "n_equal_rows": 0}
    assert judge("continuations", [values])[0] == "held"
    kind, says = judge("continuations", [{**values, "n_equal_rows": 3}])
    assert (kind, "3 pairs of tokens with equal embedding rows" in says) == ("limit", True)


def test_the_weakest_verdict_is_the_claims() -> None:
    assert worst(["held", "limit"]) == "limit"
    assert worst(["held", "wrong", "limit"]) == "wrong"
    assert worst(["open", "held"]) == "held"
    assert worst([]) == "open"
