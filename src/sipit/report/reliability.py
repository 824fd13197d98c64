"""The figure of posteriors against the truth: what was stated, and how often it was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sipit.report.plots import COLOURS, INK, panels, require_drawable, save


@dataclass(frozen=True, kw_only=True)
class Stated:
    """Claims of like certainty."""

    mean: float  # of the posteriors stated
    right: float  # share of them that were right
    low: float  # of the interval of that share
    high: float
    n: int  # claims


def draw_reliability(groups: Sequence[Stated], path: Path | str) -> None:
    """Draw how often claims were right against how sure they said they were, with intervals; on the diagonal is honest.

    Args:
        groups: of claims, such as those of each tenth.
        path: of the figure; its suffix names the format (.svg, .png, .pdf).

    Raises:
        OptionError: matplotlib is not installed, or knows no such format.
        StorageError: the path cannot be written.
    """
    require_drawable(path)
    figure, (axis,) = panels(1)
    axis.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    x, y = [g.mean for g in groups], [g.right for g in groups]
    errors = [[g.right - g.low for g in groups], [g.high - g.right for g in groups]]
    axis.errorbar(x, y, yerr=errors, color=COLOURS[0], marker="o", linestyle="none", capsize=3)
    for group in groups:
        axis.annotate(
            str(group.n), (group.mean, group.low), xytext=(0, -11), textcoords="offset points", color=INK,
            ha="center", fontsize=7,
        )  # fmt: skip
    axis.set_xlim(0, 1.03)
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("posterior stated (mean of each tenth)")
    axis.set_ylabel("share right, 95 % interval; claims below")
    save(figure, path)
