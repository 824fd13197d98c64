"""The figure of posteriors against the truth shows what was stated, what was right, and how many claims there were."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sipit.errors import OptionError
from sipit.report.reliability import Stated, draw_reliability

GROUPS = [
    Stated(mean=0.2, right=0.3, low=0.1, high=0.6, n=10),
    Stated(mean=0.95, right=0.9, low=0.8, high=0.97, n=123),
]


def test_points_bear_their_interval_and_their_number(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_reliability(GROUPS, tmp_path / "reliability.svg")
    (axis,) = drawn[0].axes
    points, _, (bars,) = axis.containers[0]
    assert points.get_xydata().tolist() == [[0.2, 0.3], [0.95, 0.9]]
    ends = [[float(y) for _, y in segment] for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.1, 0.6]), pytest.approx([0.8, 0.97])]
    assert [text.get_text() for text in axis.texts] == ["10", "123"]
    assert (tmp_path / "reliability.svg").read_text("utf-8").startswith("<?xml")


def test_a_format_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="svg"):
        draw_reliability(GROUPS, tmp_path / "reliability.txt")
    assert not list(tmp_path.iterdir())
