"""The figure of what methods cost shows what their records say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sipit.report.cost import draw_cost


def _run(method: str, layer: int, seq_len: int, ratio: float, *, exact: bool = True) -> dict[str, Any]:
    return {"method": method, "layer": layer, "seq_len": seq_len, "prefill_ratio": ratio, "exact": exact}


SMALL = {
    "model": "small",
    "vocab_size": 100,
    "runs": [
        _run("auto", 1, 64, 1.0),
        _run("auto", 1, 64, 3.0),
        _run("auto", 2, 64, 4.0),
        _run("auto", 2, 256, 8.0),
        _run("auto", 2, 64, 999.0, exact=False),
        _run("random", 1, 4, 50.0),
    ],
}
LARGE = {"model": "large", "vocab_size": 800, "runs": [_run("auto", 3, 64, 6.0)]}


def _lines(axis: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }


def test_panels_show_layer_length_and_vocabulary(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_cost([SMALL, LARGE], tmp_path / "f.svg")
    layer, length, vocabulary = drawn[0].axes
    assert _lines(layer) == {"auto": ([1, 2], [2, 4]), "random, 4 tokens": ([1], [50])}
    assert _lines(length) == {"auto": ([64, 256], [4, 8])}
    assert _lines(vocabulary) == {"auto": ([100, 800], [4, 6])}
    assert all(axis.get_ylabel() for axis in drawn[0].axes)
    for axis in drawn[0].axes:  # each line bears its name, and lines differ in more than colour
        assert {text.get_text() for text in axis.texts} == set(_lines(axis))
        shown = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
        assert len({line.get_marker() for line in shown}) == len({line.get_color() for line in shown}) == len(shown)


def test_one_record_of_one_length_is_one_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_cost([LARGE], tmp_path / "f.png")
    assert len(drawn[0].axes) == 1
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
