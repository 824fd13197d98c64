"""What every drawn figure shares: colours and markers that are told apart without each other, lines that bear their
names, and ink that is read on white and in the dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from sipit.errors import OptionError
from sipit.storage import whole_file

FORMATS = (".svg", ".png", ".pdf")
INK = "#7a7f87"  # of axes and words
# Okabe and Ito's colours that colour-blind readers tell apart, without those too pale for white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
_GAP = 0.07  # of the height of a panel, between the names of two lines
_NAMES = 0.22  # of the width of a panel, kept at the right for them


def require_drawable(path: Path | str) -> None:
    """Find out before long work that a figure cannot be drawn.

    Raises:
        OptionError: matplotlib is not installed, or the file's suffix names no format.
    """
    if Path(path).suffix not in FORMATS:
        raise OptionError(f"cannot draw {path}: name a file ending in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(
            'figures need matplotlib, which is not installed; install "sipit[report]", or leave the figure out'
        ) from error


def panels(n: int, *, width: float = 5.0, height: float = 3.8) -> tuple[Any, list[Any]]:
    """Return a figure of n panels side by side, and their axes; width and height of one in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(n * width, height), layout="constrained")
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for axis in axes:
        axis.patch.set_visible(False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(INK)
        axis.tick_params(which="both", colors=INK)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return figure, axes


def draw_lines(axis: Any, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> None:
    """Draw (name, x, y) each with a colour and a marker of its own, and its name at its end.

    To be called once the scales of the axis are set.
    """
    styles = zip(cycle(COLOURS), islice(cycle(MARKERS), len(lines)), strict=False)
    for (name, x, y), (colour, marker) in zip(lines, styles, strict=False):
        axis.plot(x, y, color=colour, marker=marker, markersize=5, label=name)
    _name_lines(axis)


def _name_lines(axis: Any) -> None:
    """Write each line's name beside its last point, moved up or down where names would lie on one another."""
    low, high = axis.get_xlim()
    to_axes = axis.transScale + axis.transLimits
    log_x = axis.get_xscale() == "log"
    if not log_x:
        axis.set_xticks([tick for tick in axis.get_xticks() if low <= tick <= high])  # none where the names stand
    room = (high / low) ** (_NAMES / (1 - _NAMES)) if log_x else _NAMES / (1 - _NAMES) * (high - low)
    axis.set_xlim(low, high * room if log_x else high + room)
    ends = []
    for line in axis.get_lines():
        points = [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if y == y]
        if points and not str(line.get_label()).startswith("_"):
            ends.append((*to_axes.transform(points[-1]), line))
    ends.sort(key=lambda end: float(end[1]))
    heights: list[float] = []
    for _, height, _ in ends:
        heights.append(max(float(height), heights[-1] + _GAP) if heights else float(height))
    over = max(heights[-1] - 1.0, 0.0) if heights else 0.0
    for (x, _, line), height in zip(ends, heights, strict=True):
        axis.text(
            float(x) + 0.025, height - over, line.get_label(), transform=axis.transAxes, color=line.get_color(),
            va="center", fontsize=8,
        )  # fmt: skip


def save(figure: Any, path: Path | str) -> None:
    """Write a figure, on no ground of its own, whole or not at all.

    Raises:
        StorageError: the path cannot be written.
    """
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.removeprefix("."), transparent=True)
