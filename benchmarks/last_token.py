"""Prompts from the state of their last token alone: share recovered exactly, tokens right and seconds, by length.

python -m benchmarks.last_token --text-file F --layer 1 --lengths 4,6,8,12,16 --prompts 20 --json OUT
python -m benchmarks.last_token --random-ids --layer 1 --lengths 3 --prompts 20
python -m benchmarks.last_token --text-file F --layer 1 --lengths 4,6,8 --decoys 2000
python -m benchmarks.last_token --plot docs/last-token.svg OUT [OUT ...]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sipit
from sipit.inversion.last.judge import LastJudge
from sipit.report.plots import draw_lines, panels, save

_DRAWN = (4, 6, 8)  # tokens of the prompts whose seconds are drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", default="1", help="blocks run, or 'final'")
    parser.add_argument("--text-file", type=Path)
    parser.add_argument("--random-ids", action="store_true")
    parser.add_argument("--lengths", default="4,6,8")
    parser.add_argument("--prompts", type=int, default=20, help="of each length")
    parser.add_argument("--max-tokens", type=int, default=8, help="longest prompt sought; longer lengths raise it")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoys", type=int, help="judge so many prompts a token or two away instead of searching")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the records named instead of measuring")
    parser.add_argument("records", nargs="*", type=Path)
    options = parser.parse_args()
    if options.plot is not None:
        _draw(options.plot, [run for path in options.records for run in json.loads(path.read_text("utf-8"))["runs"]])
        return
    lm = sipit.load(options.model)
    cut = {"layer": lm.n_layers, "site": "final"} if options.layer == "final" else {"layer": int(options.layer)}
    ids = None if options.random_ids else lm.encode(options.text_file.read_text("utf-8"))
    generator = torch.Generator().manual_seed(options.seed)
    if options.decoys is not None:
        if ids is None:
            parser.error("--decoys takes the prompts of a text: pass --text-file")
        _judge_decoys(lm, ids, cut, list(map(int, options.lengths.split(","))), options.decoys, generator)
        return
    warm = lm.capture(input_ids=torch.arange(2), **cut).states[-1]
    sipit.invert_last(lm, warm, max_tokens=2, seconds=1, **cut)  # what is prepared once a process
    runs = []
    for length in map(int, options.lengths.split(",")):
        kept = []
        for _ in range(options.prompts):
            if ids is None:
                prompt = torch.randint(lm.vocab_size, (length,), generator=generator)
            else:
                at = int(torch.randint(len(ids) - length, (1,), generator=generator))
                prompt = ids[at : at + length]
            kept.append(_run(lm, prompt, cut, max(options.max_tokens, length), options.seconds))
            runs.append({"layer": options.layer, "length": length, "random_ids": ids is None, **kept[-1]})
            if options.json is not None:
                about = {"model": options.model, "seconds": options.seconds, "threads": torch.get_num_threads()}
                options.json.write_text(json.dumps({**about, "runs": runs}, indent=1), encoding="utf-8")
        n_exact = sum(run["exact"] and run["verdict"] == "recovered" for run in kept)
        n_wrong = sum(not run["exact"] and run["verdict"] == "recovered" for run in kept)
        share = sum(run["tokens_right"] for run in kept) / (length * len(kept))
        print(
            f"layer {options.layer}, {length} tokens: {n_exact} of {len(kept)} recovered, {n_wrong} wrong, "
            f"{share:.0%} of tokens, median {median(run['seconds'] for run in kept):.1f} s",
            flush=True,
        )


def _judge_decoys(
    lm: sipit.LanguageModel,
    ids: torch.Tensor,
    cut: dict[str, Any],
    lengths: list[int],
    n_decoys: int,
    generator: torch.Generator,
) -> None:
    """Count prompts near the true one that the judge would let pass: there should be none."""
    n_tried = n_passed = 0
    while n_tried < n_decoys:
        length = lengths[n_tried % len(lengths)]
        at = int(torch.randint(len(ids) - length, (1,), generator=generator))
        prompt = ids[at : at + length].tolist()
        if len(set(prompt)) == 1 or any(lm.embeddings.twins(token) for token in prompt):
            continue  # a prompt that others equal by design
        decoys = set()
        for place, token in enumerate(prompt):
            gaps = lm.embeddings.squared_distances(lm.embeddings.rows(torch.tensor([token]))[0])
            gaps[token] = torch.inf
            near = [int(i) for i in gaps.topk(2, largest=False).indices]
            for other in [*near, int(torch.randint(lm.vocab_size, (1,), generator=generator))]:
                decoys.add((*prompt[:place], other, *prompt[place + 1 :]))
            decoys.add((*prompt[:place], *prompt[place + 1 :]))
            decoys.add((*prompt[: place + 1], *prompt[place:]))
            decoys.add((*prompt[:place], *prompt[place : place + 2][::-1], *prompt[place + 2 :]))
        decoys.discard(tuple(prompt))
        judge = LastJudge(lm=lm, seen=lm.capture(input_ids=prompt, **cut).last_rows(1), budget=float("inf"))
        judge.score(sorted(decoys), to_the_end=True)
        n_tried, n_passed = n_tried + len(decoys), n_passed + len(judge.fitting)
        for passed in judge.fitting:
            print(f"PASSED {passed} for {tuple(prompt)}")
    print(f"{cut}: {n_tried} prompts near the true one judged, {n_passed} within tolerance")


def _run(
    lm: sipit.LanguageModel, prompt: torch.Tensor, cut: dict[str, Any], max_tokens: int, seconds: float
) -> dict[str, Any]:
    state = lm.capture(input_ids=prompt, **cut).states[-1]
    began = time.perf_counter()
    found = sipit.invert_last(lm, state, max_tokens=max_tokens, seconds=seconds, **cut)
    took = time.perf_counter() - began
    truth = prompt.tolist()
    answer = list(found.input_ids or (found.other_prompts[0] if found.other_prompts else ()))
    right = sum(a == b for a, b in zip(answer[::-1], truth[::-1], strict=False))
    return {
        "verdict": found.verdict,
        "exact": answer == truth and found.verdict != "unmatched",
        "is_named": tuple(truth) in found.other_prompts or answer == truth,
        "tokens_right": right,  # of the answer, or of the nearest prompt, counted from the end
        "seconds": took,
    }


def _draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draw the share recovered: against the length of the prompt, and against the seconds given.

    A line for each layer and kind of prompt, in the second panel for each of three lengths of text too.
    """
    series: dict[tuple[str, bool], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        is_found = run["exact"] and run["verdict"] == "recovered"
        series[run["layer"], run["random_ids"]][run["length"]].append(run["seconds"] if is_found else math.inf)
    by_length, by_seconds = [], []
    most = max(run["seconds"] for run in runs)
    for (layer, is_random), found in sorted(series.items()):
        name = "final" if layer == "final" else f"layer {layer}"
        shares = [100 * sum(map(math.isfinite, found[n])) / len(found[n]) for n in sorted(found)]
        by_length.append((name + (", random ids" if is_random else ""), sorted(found), shares))
        for n in [] if is_random else sorted(set(found) & set(_DRAWN)):
            took = sorted(filter(math.isfinite, found[n]))
            shares = [100 * (i + 1) / len(found[n]) for i in range(len(took))]
            by_seconds.append((f"{name}, {n} tokens", [1.0, *took, most], [0.0, *shares, (shares or [0.0])[-1]]))
    figure, (lengths, seconds) = panels(2, width=6.0)
    for axis in (lengths, seconds):
        axis.set_ylim(-4, 104)
        axis.set_ylabel("% recovered exactly")
    lengths.set_xlabel("tokens of the prompt")
    seconds.set_xlabel("seconds of one core")
    seconds.set_xscale("log")
    seconds.set_xlim(1, most)
    draw_lines(lengths, by_length)
    draw_lines(seconds, by_seconds)
    save(figure, path)


if __name__ == "__main__":
    main()
