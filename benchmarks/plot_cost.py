"""Draw cost against layer, prompt length and vocabulary from records of `sipit bench`.

python -m benchmarks.plot_cost --out docs/cost.svg RECORD.json …   (needs the "report" extra)
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

_VOCABULARY = {"smollm2-135m": 49_152, "gemma-3-270m": 262_144}
_DEPTH = {"smollm2-135m": 30, "gemma-3-270m": 18}
_USUAL = 64  # tokens
_MARKS = {"auto": "o", "auto-no-fit": "s", "vocabulary-matching": "^", "reference-sipit": "v", "random": "x"}


def main() -> None:
    """Read the records and write the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = [
        {**run, "model": record["model"]}
        for record in (json.loads(path.read_text(encoding="utf-8")) for path in options.records)
        for run in record["runs"]
        if run["exact"]
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    smol = [run for run in runs if run["model"] == "smollm2-135m"]
    _panel(axes[0], _of_usual_length(smol), "layer", "layer (64 tokens, or what the legend says)")
    _panel(axes[1], [r for r in smol if r["layer"] == 15], "seq_len", "prompt length (layer 15)")
    middle = [r for r in runs if r["layer"] * 2 == _DEPTH.get(r["model"]) and r["seq_len"] == 64]
    _panel(axes[2], [{**r, "vocab": _VOCABULARY[r["model"]]} for r in middle], "vocab", "vocabulary (middle layer)")
    for axis in axes[1:]:
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("prefill_ratio")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.out)


def _of_usual_length(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep 64-token runs; of a method that has none, those of its commonest length, which its name then says."""
    kept = [r for r in runs if r["seq_len"] == _USUAL]
    for method in {r["method"] for r in runs} - {r["method"] for r in kept}:
        lengths = [r["seq_len"] for r in runs if r["method"] == method]
        usual = statistics.mode(lengths)
        kept += [
            {**r, "label": f"{method}, {usual} tokens"} for r in runs if (r["method"], r["seq_len"]) == (method, usual)
        ]
    return kept


def _panel(axis: Any, runs: list[dict[str, Any]], key: str, label: str) -> None:
    for method, mark in _MARKS.items():
        groups: dict[float, list[float]] = defaultdict(list)
        for run in runs:
            if run["method"] == method:
                groups[run[key]].append(run["prefill_ratio"])
        places = sorted(groups)
        if places:
            name = next(run.get("label", method) for run in runs if run["method"] == method)
            axis.plot(places, [statistics.mean(groups[p]) for p in places], marker=mark, label=name)
    axis.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel(label)


if __name__ == "__main__":
    main()
