"""The figure of a collision survey: distances by layer, raw and without scale, and by prompt length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sipit.report.plots import COLOURS, INK, draw_lines, panels, require_drawable, save

_SHOWN_LENGTH_LAYERS = 5


def draw_survey(record: dict[str, Any], path: Path | str) -> None:
    """Draw a survey record: box plots of the distances, the closest pair beside them, and both by length.

    Args:
        record: as `sipit collisions survey --json` writes it.
        path: of the figure; its suffix names the format (.svg, .png, .pdf).

    Raises:
        OptionError: matplotlib is not installed, or knows no such format.
        StorageError: the path cannot be written.
    """
    require_drawable(path)
    layers = record["layers"]
    figure, (boxes, scales, lengths) = panels(3, width=4.6, height=4.2)
    _draw_boxes(boxes, layers)
    _draw_scales(scales, layers)
    _draw_lengths(lengths, layers)
    figure.suptitle(f"{record['model']}: last-token states of {record['n_prompts']:,} prompts", color=INK)
    save(figure, path)


def _names(layers: Sequence[dict[str, Any]]) -> list[str]:
    return ["final" if layer["site"] == "final" else str(layer["layer"]) for layer in layers]


def _draw_boxes(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    """Boxes from the quartiles, whiskers at 1 and 99 %, the closest pair as a point."""
    stats = []
    for name, layer in zip(_names(layers), layers, strict=True):
        at = dict(map(tuple, layer["spread"]["percentiles"]))
        stats.append({"label": name, "whislo": at[1], "q1": at[25], "med": at[50], "q3": at[75], "whishi": at[99]})
    places = range(len(layers))
    ink = {"color": INK}
    axis.bxp(
        stats, positions=places, showfliers=False, widths=0.6,
        boxprops=ink, whiskerprops=ink, capprops=ink, medianprops={"color": COLOURS[3]},
    )  # fmt: skip
    closest = [layer["closest"][0]["distance"] for layer in layers]
    varied = [(layer["closest_varied"] or layer["closest"])[0]["distance"] for layer in layers]
    for values, colour, marker, label in (
        (varied, COLOURS[1], "s", "closest, one token repeated left out"),
        (closest, COLOURS[0], "o", "closest pair"),
    ):
        axis.plot(places, values, marker, color=colour, markersize=4, label=label)
    axis.axhline(layers[0]["threshold"], color=INK, linewidth=0.8, linestyle=":", label="threshold")
    kind = "sampled pairs" if layers[0]["spread"]["is_sampled"] else "all pairs"
    _finish(axis, _names(layers), f"layer (box: quartiles, whiskers 1 and 99 %, {kind})", "L2 distance")
    _legend_below(axis)


def _draw_scales(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    closest = [(layer["closest_varied"] or layer["closest"])[0] for layer in layers]
    _finish(axis, _names(layers), "layer", "closest pair, without scale")
    for key, label, colour, marker in (
        ("relative_to_norm", "over the states' norm", COLOURS[0], "o"),
        ("relative_to_median", "over the median distance", COLOURS[1], "s"),
    ):
        values = [pair[key] or float("nan") for pair in closest]
        axis.plot(range(len(layers)), values, color=colour, marker=marker, markersize=4, label=label)
    _legend_below(axis)


def _draw_lengths(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    """The closest pair among prompts of one length, at a few layers."""
    step = max(1, len(layers) // _SHOWN_LENGTH_LAYERS)
    shown = list(zip(_names(layers), layers, strict=True))[::-1][::step]
    axis.set_yscale("log")
    axis.set_xlabel("prompt length (tokens)")
    axis.set_ylabel("closest pair of that length, L2")
    draw_lines(
        axis,
        [
            (
                name if name == "final" else f"layer {name}",
                [b["length"] for b in layer["by_length"]],
                [b["least"] for b in layer["by_length"]],
            )
            for name, layer in shown
        ],
    )


def _legend_below(axis: Any) -> None:
    axis.legend(
        fontsize=8, frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.2), borderaxespad=0
    )


def _finish(axis: Any, names: Sequence[str], x: str, y: str) -> None:
    step = max(1, len(names) // 8)
    places = [*range(0, len(names) - step, step), len(names) - 1]  # the last one named, and none too near it
    axis.set_yscale("log")
    axis.set_xticks(places, [names[place] for place in places])
    axis.set_xlabel(x)
    axis.set_ylabel(y)
