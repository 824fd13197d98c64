"""The figure of records of `sipit bench`: what an inversion costs, by layer, by length and by vocabulary."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sipit.report.plots import INK, draw_lines, panels, require_drawable, save

_AT_LEAST_TWO = 2  # places that a panel compares


def draw_cost(records: Sequence[dict[str, Any]], path: Path | str) -> None:
    """Draw the mean prefill_ratio of each method: against the layer, and against what else the records differ in.

    A panel against the length of the prompts is drawn where there are several lengths at one layer, one against the
    vocabulary where there are several models.

    Args:
        records: as `sipit bench --json` writes them, of any models.
        path: of the figure; its suffix names the format (.svg, .png, .pdf).

    Raises:
        OptionError: matplotlib is not installed, or knows no such format.
        StorageError: the path cannot be written.
    """
    require_drawable(path)
    runs = [{**run, "model": r["model"], "vocab": r.get("vocab_size")} for r in records for run in r["runs"]]
    runs = [run for run in runs if run["exact"]]
    model = statistics.mode(run["model"] for run in runs)
    own = [run for run in runs if run["model"] == model]
    length = statistics.mode(run["seq_len"] for run in own)
    drawn = [(_at_length(own, length), "layer", f"layer ({model}, {length} tokens or as named)")]
    layer, n_lengths = _most_lengths(own)
    if n_lengths >= _AT_LEAST_TWO:
        here = [run for run in own if run["layer"] == layer]
        drawn.append((here, "seq_len", f"tokens of the prompt ({model}, layer {layer})"))
    of_length = [run for run in runs if run["seq_len"] == length and run["vocab"]]
    if len({run["vocab"] for run in of_length}) >= _AT_LEAST_TWO:
        drawn.append((_middle_layers(of_length), "vocab", "vocabulary (layer in the middle)"))
    figure, axes = panels(len(drawn))
    for axis, (shown, key, label) in zip(axes, drawn, strict=True):
        _panel(axis, shown, key, label)
    save(figure, path)


def _at_length(runs: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Keep runs of one length; of a method that has none, those of its commonest length, which its name then says."""
    kept = [run for run in runs if run["seq_len"] == length]
    for method in {run["method"] for run in runs} - {run["method"] for run in kept}:
        usual = statistics.mode(run["seq_len"] for run in runs if run["method"] == method)
        name = f"{method}, {usual} tokens"
        kept += [{**run, "label": name} for run in runs if (run["method"], run["seq_len"]) == (method, usual)]
    return kept


def _most_lengths(runs: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the layer at which one method was run at the most lengths, and how many they are."""
    lengths: dict[tuple[int, str], set[int]] = defaultdict(set)
    for run in runs:
        lengths[run["layer"], run["method"]].add(run["seq_len"])
    (layer, _), found = max(lengths.items(), key=lambda item: len(item[1]))
    return layer, len(found)


def _middle_layers(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep, of each model, the runs of the layer in the middle of those that it was run at."""
    kept = []
    for model in sorted({run["model"] for run in runs}):
        layers = sorted({run["layer"] for run in runs if run["model"] == model})
        kept += [r for r in runs if (r["model"], r["layer"]) == (model, layers[len(layers) // 2])]
    return kept


def _panel(axis: Any, runs: list[dict[str, Any]], key: str, label: str) -> None:
    axis.set_yscale("log")
    if key != "layer":
        axis.set_xscale("log", base=2)
    groups: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run.get("label", run["method"])][run[key]].append(run["prefill_ratio"])
    lines = [
        (name, sorted(found), [statistics.mean(found[place]) for place in sorted(found)])
        for name, found in sorted(groups.items())
    ]
    axis.axhline(1.0, color=INK, linewidth=0.8, linestyle=":", label="_one plain pass")
    draw_lines(axis, lines)
    axis.set_xlabel(label)
    axis.set_ylabel("prefill_ratio (dotted: one plain pass)")
