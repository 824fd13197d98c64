"""The figure of a collision survey: distances by layer, raw and without scale, and by prompt length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sipit.errors import OptionError
from sipit.storage import whole_file

_SHOWN_LENGTH_LAYERS = 5


FORMATS = (".svg", ".png", ".pdf")


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
    from matplotlib.figure import Figure

    layers = record["layers"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    boxes, scales, lengths = figure.subplots(1, 3)
    _draw_boxes(boxes, layers)
    _draw_scales(scales, layers)
    _draw_lengths(lengths, layers)
    figure.suptitle(f"{record['model']}: last-token states of {record['n_prompts']:,} prompts")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.removeprefix("."))


def _names(layers: Sequence[dict[str, Any]]) -> list[str]:
    return ["final" if layer["site"] == "final" else str(layer["layer"]) for layer in layers]


def _draw_boxes(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    """Boxes from the quartiles, whiskers at 1 and 99 %, the closest pair as a point."""
    stats = []
    for name, layer in zip(_names(layers), layers, strict=True):
        at = dict(map(tuple, layer["spread"]["percentiles"]))
        stats.append({"label": name, "whislo": at[1], "q1": at[25], "med": at[50], "q3": at[75], "whishi": at[99]})
    places = range(len(layers))
    axis.bxp(stats, positions=places, showfliers=False, widths=0.6)
    axis.plot(places, [layer["closest"][0]["distance"] for layer in layers], "o", markersize=3, label="closest pair")
    varied = [(layer["closest_varied"] or layer["closest"])[0]["distance"] for layer in layers]
    axis.plot(places, varied, "s", markersize=3, label="closest, one token repeated left out")
    axis.axhline(layers[0]["threshold"], color="grey", linewidth=0.8, linestyle=":", label="threshold")
    kind = "sampled pairs" if layers[0]["spread"]["is_sampled"] else "all pairs"
    _finish(axis, places, _names(layers), f"layer (box: quartiles, whiskers 1 and 99 %, {kind})", "L2 distance")
    axis.legend(fontsize=8)


def _draw_scales(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    places = range(len(layers))
    for key, label in (("relative_to_norm", "over the states' norm"), ("relative_to_median", "over the median")):
        closest = [(layer["closest_varied"] or layer["closest"])[0] for layer in layers]
        axis.plot(places, [pair[key] or float("nan") for pair in closest], marker="o", markersize=3, label=label)
    _finish(axis, places, _names(layers), "layer", "closest pair, without scale")
    axis.legend(fontsize=8)


def _draw_lengths(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    """The closest pair among prompts of one length, at a few layers."""
    step = max(1, len(layers) // _SHOWN_LENGTH_LAYERS)
    for name, layer in list(zip(_names(layers), layers, strict=True))[::-1][::step]:
        by_length = layer["by_length"]
        axis.plot(
            [b["length"] for b in by_length], [b["least"] for b in by_length], marker="o", markersize=3, label=name
        )
    axis.set_yscale("log")
    axis.set_xlabel("prompt length (tokens)")
    axis.set_ylabel("closest pair of that length, L2")
    axis.legend(fontsize=8, title="layer")


def _finish(axis: Any, places: Sequence[int], names: Sequence[str], x: str, y: str) -> None:
    step = max(1, len(names) // 12)
    axis.set_yscale("log")
    axis.set_xticks(list(places)[::step], list(names)[::step])
    axis.set_xlabel(x)
    axis.set_ylabel(y)
