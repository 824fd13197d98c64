"""The figure of a survey shows what the record says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from sipit.errors import OptionError, StorageError
from sipit.report import collisions, plots


def _values(line: Any) -> list[float]:
    return [float(value) for value in line.get_ydata()]


def _record() -> dict[str, Any]:
    def layer(number: int, site: str, least: float) -> dict[str, Any]:
        return {
            "layer": number,
            "site": site,
            "threshold": 1e-6,
            "closest_varied": [{"distance": 3 * least, "relative_to_norm": least / 50, "relative_to_median": None}],
            "closest": [{"distance": least, "relative_to_norm": least / 50, "relative_to_median": None}],
            "spread": {"is_sampled": True, "percentiles": [[1, 2.0], [25, 3.0], [50, 4.0], [75, 5.0], [99, 6.0]]},
            "by_length": [{"length": 4, "least": least}, {"length": 8, "least": 2 * least}],
        }

    layers = [layer(1, "block", 0.5), layer(2, "block", 0.25), layer(2, "final", 0.125)]
    return {"model": "tiny", "n_prompts": 1234, "layers": layers}


def test_figure_shows_the_closest_pair_of_each_layer(tmp_path: Path, drawn: list[Figure]) -> None:
    collisions.draw_survey(_record(), tmp_path / "f.svg")
    boxes, scales, lengths = drawn[0].axes
    shown: dict[Any, list[float]] = {line.get_label(): _values(line) for line in boxes.lines}
    assert shown["closest pair"] == [0.5, 0.25, 0.125]
    assert shown["closest, one token repeated left out"] == [1.5, 0.75, 0.375]
    assert _values(scales.lines[0]) == [0.01, 0.005, 0.0025]
    assert {line.get_label(): _values(line) for line in lengths.lines}["final"] == [0.125, 0.25]
    assert (tmp_path / "f.svg").read_bytes().startswith(b"<?xml")


def test_unknown_format_and_missing_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ending in \.svg, \.png"):
        collisions.draw_survey(_record(), tmp_path / "f.xyz")
    with pytest.raises(StorageError, match="cannot write"):
        collisions.draw_survey(_record(), tmp_path / "none" / "f.svg")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"sipit\[report\]"):
        plots.require_drawable("f.svg")
