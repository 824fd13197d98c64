"""Closest pair of real states against faiss's exact search, in one run with the same threads.

    python -m benchmarks.nearest_pairs --folder STATES --layer 15 --rows 10000,30000,100000 [--json OUT] [--plot FILE]

STATES is a folder that `sipit collisions survey` or `capture_states` filled; of fewer rows than asked
for, noisy copies fill up what is missing (noise of a tenth of the median distance), and the line says
so. faiss finds the two nearest rows of every row (itself and its neighbour), which answers the
same question; its answer is compared with ours. Rows that are equal would give both 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipit.collisions import StateFolder, sampled_spread, search_pairs
from sipit.observations import Cut
from sipit.report.plots import draw_lines, panels, save


def rows_of(folder: StateFolder, layer: str, n_rows: int) -> tuple[Tensor, bool]:
    """Return n rows at a layer, and whether some are noisy copies of others. (n, D)."""
    rows = torch.cat(folder.blocks(_cut(layer, folder)))
    if n_rows <= len(rows):
        return rows[:n_rows].contiguous(), False
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * sampled_spread([rows], n_pairs=20_000).median / rows.shape[1] ** 0.5
    copied = rows[torch.randint(len(rows), (n_rows - len(rows),), generator=generator)]
    return torch.cat([rows, copied + noise * torch.randn(copied.shape, generator=generator)]), True


def _cut(layer: str, folder: StateFolder) -> Cut:
    if layer == "final":
        return next(cut for cut in folder.cuts if cut[1] == "final")
    return Cut(int(layer))


def planted(rows: Tensor) -> tuple[Tensor, float]:
    """Return the rows with their last one put 1e-6 from the first, in one small coordinate, and that distance."""
    rows = rows.clone()
    rows[-1] = rows[0]
    place = int(rows[0].abs().argmin())
    rows[-1, place] += 1e-6
    return rows, float((rows[0].double() - rows[-1].double()).norm())


def by_faiss(rows: Tensor) -> tuple[int, int]:
    """Return the closest pair by an exact search for the two nearest rows of every row."""
    import faiss

    table = rows.numpy()
    index = faiss.IndexFlatL2(table.shape[1])
    index.add(table)
    distances, neighbours = index.search(table, 2)
    own = torch.arange(len(rows)).numpy()
    other = (neighbours != own[:, None]).argmax(axis=1)  # the one that is not the row itself
    best = int(distances[own, other].argmin())
    first, second = sorted((best, int(neighbours[best, other[best]])))
    return first, second


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layer", default="15", help="blocks run, or 'final'")
    parser.add_argument("--rows", default="10000,30000,100000")
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the median counts")
    parser.add_argument(
        "--faiss-up-to", type=int, default=100_000, metavar="N", help="rows beyond which faiss is left out"
    )
    parser.add_argument("--plant", action="store_true", help="plant a pair 1e-6 apart and look for it, nothing else")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="cost against number of rows")
    options = parser.parse_args()
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    folder = StateFolder(options.folder)
    runs: list[dict[str, Any]] = []
    for n_rows in map(int, options.rows.split(",")):
        rows, is_padded = rows_of(folder, options.layer, n_rows)
        if options.plant:
            rows, distance = planted(rows)
            found = search_pairs([rows], within=2 * distance)
            is_found = (found.pairs[0].first, found.pairs[0].second, found.n_collisions) == (0, n_rows - 1, 1)
            print(f"{n_rows:>8} rows, a pair planted {distance:.6g} apart: {'found' if is_found else 'NOT FOUND'}, "
                  f"{found.pairs[0].distance:.6g} apart, {found.n_collisions} within twice that")  # fmt: skip
            continue
        seconds = []
        for _ in range(options.repeats):
            started = time.perf_counter()
            found = search_pairs([rows])
            seconds.append(time.perf_counter() - started)
        run: dict[str, Any] = {"rows": n_rows, "padded": is_padded, "ours": statistics.median(seconds)}
        [pair] = found.pairs
        line = (
            f"{n_rows:>8} rows{' (some noisy copies)' if is_padded else ''}: {run['ours']:.2f} s, closest "
            f"{pair.distance:.6g}, {found.n_covered:,} pairs, {found.n_projected / found.n_covered:.1%} projected, "
            f"{found.n_multiplied / found.n_covered:.2%} multiplied, {found.n_decided} decided"
        )
        if n_rows <= options.faiss_up_to:
            started = time.perf_counter()
            theirs = by_faiss(rows)
            run["faiss"] = time.perf_counter() - started
            apart = float((rows[theirs[0]].double() - rows[theirs[1]].double()).norm())
            same = "the same pair" if theirs == (pair.first, pair.second) else f"another pair, {apart:.6g} apart"
            line += f"; faiss {run['faiss']:.1f} s ({run['faiss'] / run['ours']:.1f} times ours): {same}"
        print(line, flush=True)
        runs.append(run)
    record = {"threads": torch.get_num_threads(), "layer": options.layer, "runs": runs}
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        _plot(runs, options.plot)


def _plot(runs: list[dict[str, Any]], path: Path) -> None:
    theirs = [r for r in runs if "faiss" in r]
    figure, (axis,) = panels(1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("rows")
    axis.set_ylabel("seconds")
    lines = [("sipit, exact", runs, "ours"), ("faiss flat, k = 2", theirs, "faiss")]
    draw_lines(axis, [(name, [r["rows"] for r in of], [r[key] for r in of]) for name, of, key in lines])
    save(figure, path)


if __name__ == "__main__":
    main()
