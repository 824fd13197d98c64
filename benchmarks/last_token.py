"""Prompts from the state of their last token alone: share recovered exactly, tokens right and seconds, by length.

python -m benchmarks.last_token --text-file F --layer 1 --lengths 4,6,8,12,16 --prompts 20 --json OUT
python -m benchmarks.last_token --random-ids --layer 1 --lengths 3 --prompts 20
python -m benchmarks.last_token --text-file F --layer 15 --lengths 4,6 --by "network alone" --json OUT
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
from sipit.inversion.inverses.prompt_network import PromptReader
from sipit.inversion.inverses.prompt_store import load_prompt_fit
from sipit.inversion.last.decode import Prompt, ranked_prompts
from sipit.inversion.last.judge import LastJudge
from sipit.observations import Observation
from sipit.report.plots import draw_lines, panels, save

_DRAWN, _COMPARED = (4, 6, 8), (4, 6)  # tokens of the prompts whose seconds are drawn: of one way, of several
_ALL, _NETWORK, _LINEAR = "portfolio", "network alone", "linear maps and repair"
_LEAST_SECONDS, _MOST_SECONDS = 0.5, 70.0  # of the axis: a step that has begun when the time is up is ended
_WIDTHS = (64, 512, 2048, 8192)  # beams of the readings of a network alone, one after the other


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
    parser.add_argument("--by", choices=(_ALL, _NETWORK, _LINEAR), default=_ALL)
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
            kept.append(_run(lm, prompt, cut, max(options.max_tokens, length), options.seconds, options.by))
            runs.append(
                {"layer": options.layer, "length": length, "random_ids": ids is None, "by": options.by, **kept[-1]}
            )
            if options.json is not None:
                about = {"model": options.model, "seconds": options.seconds, "threads": torch.get_num_threads()}
                options.json.write_text(json.dumps({**about, "runs": runs}, indent=1), encoding="utf-8")
        n_exact = sum(run["exact"] and run["verdict"] == "recovered" for run in kept)
        n_wrong = sum(not run["exact"] and run["verdict"] == "recovered" for run in kept)
        share = sum(run["tokens_right"] for run in kept) / (length * len(kept))
        print(
            f"layer {options.layer}, {length} tokens, {options.by}: {n_exact} of {len(kept)} recovered, "
            f"{n_wrong} wrong, {share:.0%} of tokens, median {median(run['seconds'] for run in kept):.1f} s",
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
    lm: sipit.LanguageModel, prompt: torch.Tensor, cut: dict[str, Any], max_tokens: int, seconds: float, by: str
) -> dict[str, Any]:
    seen = lm.capture(input_ids=prompt, **cut).last_rows(1)
    began = time.perf_counter()
    if by == _NETWORK:
        verdict, prompts = _read_alone(lm, seen, max_tokens, seconds)
    else:
        found = sipit.invert_last(lm, seen, max_tokens=max_tokens, seconds=seconds, use_fit=by != _LINEAR)
        verdict, prompts = found.verdict, [tuple(found.input_ids), *found.other_prompts]
    took = time.perf_counter() - began
    truth = tuple(prompt.tolist())
    answer = next(filter(None, prompts), ())
    right = sum(a == b for a, b in zip(answer[::-1], truth[::-1], strict=False))
    return {
        "verdict": verdict,
        "exact": answer == truth and verdict != "unmatched",
        "is_named": truth in prompts,
        "tokens_right": right,  # of the answer, or of the nearest prompt, counted from the end
        "seconds": took,
    }


def _read_alone(
    lm: sipit.LanguageModel, seen: Observation, max_tokens: int, seconds: float
) -> tuple[str, list[Prompt]]:
    """Run what a prompt network reads, by more and more beams, and repair nothing: a verdict, and the nearest first."""
    fit = load_prompt_fit(lm, seen.cut)
    if fit is None:
        raise SystemExit(f"no prompt network is kept of {seen.cut}; make one: sipit fit --layer L --last")
    judge = LastJudge(lm=lm, seen=seen, budget=seconds)
    reader = PromptReader(lm, fit.network)
    white = fit.network.white(seen.states.to(lm.device))
    for n_beams in _WIDTHS:
        if judge.is_over:
            break
        judge.score(ranked_prompts(reader, white, n_beams=n_beams, lengths=range(1, max_tokens + 1)))
    verdict = "recovered" if len(judge.fitting) == 1 else "ambiguous" if judge.fitting else "unmatched"
    return verdict, judge.fitting or [judge.best]


_Line = tuple[str, list[float], list[float]]  # name, x, y


def _draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draw the share recovered: against the length of the prompt, and for each layer against the seconds given.

    Behind several layers the ways of search are told apart; behind one that was searched in one way, the lengths are.
    """
    shares: dict[tuple[str, bool], dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    took: dict[str, dict[tuple[int, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        is_found, by = run["exact"] and run["verdict"] == "recovered", run.get("by", _ALL)
        if by == _ALL:
            shares[run["layer"], run["random_ids"]][run["length"]].append(is_found)
        if not run["random_ids"]:
            took[run["layer"]][run["length"], by].append(run["seconds"] if is_found else math.inf)
    figure, (lengths, *seconds) = panels(1 + len(took), width=6.0)
    lines: list[_Line] = []
    for (layer, is_random), found in sorted(shares.items()):
        percent = [100 * sum(found[n]) / len(found[n]) for n in sorted(found)]
        lines.append((_named(layer) + (", random ids" if is_random else ""), list(map(float, sorted(found))), percent))
    lengths.set_xlabel("tokens of the prompt")
    _draw_shares(lengths, lines)
    for axis, (layer, cells) in zip(seconds, took.items(), strict=True):
        axis.set_xlabel(f"seconds of one core, {_named(layer)}")
        axis.set_xscale("log")
        axis.set_xlim(_LEAST_SECONDS, _MOST_SECONDS)
        is_one_way = len({by for _, by in cells}) == 1
        lines = []
        for (n, by), each in sorted(cells.items()):
            if n not in (_DRAWN if is_one_way else _COMPARED):
                continue
            ends = sorted(filter(lambda second: second <= _MOST_SECONDS, each))
            percent = [100 * (i + 1) / len(each) for i in range(len(ends))]
            name = f"{n} tokens" if is_one_way else f"{n} tokens, {by}"
            lines.append((name, [_LEAST_SECONDS, *ends, _MOST_SECONDS], [0.0, *percent, (percent or [0.0])[-1]]))
        _draw_shares(axis, lines)
    save(figure, path)


def _named(layer: str) -> str:
    return "final" if layer == "final" else f"layer {layer}"


def _draw_shares(axis: Any, lines: list[_Line]) -> None:
    axis.set_ylim(-4, 104)
    axis.set_ylabel("% recovered exactly")
    draw_lines(axis, lines)


if __name__ == "__main__":
    main()
