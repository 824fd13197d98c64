"""Decoding behind noise, as `sipit invert --noise auto` does it: tokens found, posteriors against the truth, verdicts.

Prompts of 20 tokens cut at random out of a text, Gaussian noise at the strengths of `benchmarks.noise_strengths`, at
which nearest search behind the true prefix finds 90, 50 and 10 % of the tokens. With --wrong, what must never be
called recovered or probable instead: states of another layer, site or model, spliced, shuffled and unrelated rows;
of tiny random models of several families with --tiny. Each case is a line of the file; a second run goes on where the
first stopped.

python -m benchmarks.noise --text-file F --strengths strengths.json --prompts 10 --out noise.jsonl
python -m benchmarks.noise --text-file F --wrong --layers 5 --prompts 10 --out wrong.jsonl
python -m benchmarks.noise --wrong --tiny --layers 1,2 --prompts 3 --out tiny.jsonl
python -m benchmarks.noise --summary noise.jsonl [--figure reliability.svg]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.tiny_models import tiny_model
from torch import Tensor

import sipit
from benchmarks.noise_strengths import N_TOKENS, held_out
from benchmarks.places import FAMILIES
from sipit.audit import wilson
from sipit.inversion.judging.meter import Meter
from sipit.inversion.noise.decode import Decoded, decode, verdict_of
from sipit.inversion.noise.prior import log_probabilities_along
from sipit.observations import Observation
from sipit.report.reliability import Stated, draw_reliability
from sipit.storage import LineLog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text-file", type=Path)
    parser.add_argument("--strengths", type=Path)
    parser.add_argument("--layers", default="5,15,30")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="prompt to begin with, where several runs share the work")
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="of --wrong: tiny random models, and no text")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--figure", type=Path, help="of the summary: posteriors of tokens against the truth")
    options = parser.parse_args()
    if options.summary is not None:
        groups = summarise([json.loads(line) for line in options.summary.read_text("utf-8").splitlines()])
        if options.figure is not None:
            draw_reliability(groups, options.figure)
        return
    layers = [int(layer) for layer in options.layers.split(",")]
    log = LineLog(options.out)
    if options.tiny:
        generator = torch.Generator().manual_seed(11)
        for family in FAMILIES:
            lm, another = (sipit.LanguageModel(tiny_model(family, seed=seed), name=family) for seed in (0, 1))
            prompts = list(torch.randint(lm.vocab_size, (options.prompts, N_TOKENS), generator=generator))
            numbered = list(enumerate(prompts))
            _measure(lm, _wrong_cases(lm, numbered, layers, another), log, of=f"{family} ")
        return
    lm = sipit.load(options.model, device=options.device)
    prompts = held_out(lm, options.text_file, options.prompts, seed=11)
    numbered = list(enumerate(prompts))[options.first :]
    if options.wrong:
        _measure(lm, _wrong_cases(lm, numbered, layers), log)
    else:
        _measure(lm, _noisy_cases(lm, numbered, layers, json.loads(options.strengths.read_text("utf-8"))), log)


_Case = tuple[str, Observation, Tensor | None]


def _measure(lm: sipit.LanguageModel, cases: Iterator[_Case], log: LineLog, *, of: str = "") -> None:
    """Decode the cases that the log lacks, and note each."""
    done = {record["case"] for record in log.records()}
    for name, seen, truth in cases:
        case = of + name
        if case in done:
            continue
        began = time.perf_counter()
        found = decode(lm, seen)
        verdict, _ = verdict_of(found)
        tokens = found.input_ids
        posteriors = found.beams.token_posteriors  # (T, V)
        record: dict[str, Any] = {
            "case": case,
            "layer": seen.layer,
            "verdict": verdict,
            "posterior": found.posterior,
            "sigma": found.noise.sigma,
            "seconds": time.perf_counter() - began,
            "right": (tokens == truth).tolist() if truth is not None else None,
            "posteriors": posteriors.gather(1, tokens[:, None])[:, 0].tolist(),
            "residuals": found.residuals.record(),
            "held_out_slope": found.held_out_slope,
        }
        if truth is not None:
            likeliest = posteriors.argmax(dim=1)
            record["likeliest"] = {
                "right": (likeliest == truth).tolist(),
                "posteriors": posteriors.gather(1, likeliest[:, None])[:, 0].tolist(),
            }
            record["truth_gain"] = _log_probability(lm, seen, found, truth) - _log_probability(lm, seen, found, tokens)
        log.append(record)
        print(case, verdict, f"{found.posterior:.3f}", sum(record["right"] or []), flush=True)


def _log_probability(lm: sipit.LanguageModel, seen: Observation, found: Decoded, prompt: Tensor) -> float:
    """Return the log-probability of a prompt and its rows under the noise that was found. (T,)."""
    states = lm.cut(seen.cut).ordinary(prompt).cpu()
    own = log_probabilities_along(lm, prompt, 0, Meter()).gather(1, prompt[:, None]).sum()
    return float(found.noise.log_likelihood(seen.states, states).sum() + own)


_Numbered = list[tuple[int, Tensor]]


def _captured(lm: sipit.LanguageModel, **cut: Any) -> Observation:
    """Return what `capture` does, on the CPU, where noise is drawn."""
    seen = lm.capture(**cut)
    return replace(seen, states=seen.states.cpu())


def _noisy_cases(
    lm: sipit.LanguageModel, prompts: _Numbered, layers: list[int], strengths: dict[str, dict[str, float]]
) -> Iterator[_Case]:
    for number, prompt in prompts:
        for layer in layers:
            seen = _captured(lm, input_ids=prompt, layer=layer)
            for share, strength in strengths[str(layer)].items():
                generator = torch.Generator().manual_seed(1000 * number + layer)
                noise = strength * torch.randn(seen.states.shape, generator=generator)
                yield f"{layer} {share} {number}", replace(seen, states=seen.states + noise), prompt


def _wrong_cases(
    lm: sipit.LanguageModel, prompts: _Numbered, layers: list[int], another: sipit.LanguageModel | None = None
) -> Iterator[_Case]:
    """Yield states that are no prompt's at the layer they are said to be of, with and without noise on top."""
    for at, (number, prompt) in enumerate(prompts):
        _, other = prompts[(at + 1) % len(prompts)]
        for layer in layers:
            generator = torch.Generator().manual_seed(1000 * number + layer)
            own = _captured(lm, input_ids=prompt, layer=layer)
            states, half = own.states, N_TOKENS // 2
            scrambled = torch.randperm(states.shape[1], generator=generator)
            wrong = {
                "next layer": _captured(lm, input_ids=prompt, layer=min(layer + 1, lm.n_layers - 1)).states,
                "layer before": _captured(lm, input_ids=prompt, layer=layer - 1).states,
                "final": _captured(lm, input_ids=prompt, site="final").states,
                "spliced": torch.cat([states[:half], _captured(lm, input_ids=other, layer=layer).states[half:]]),
                "rows reversed": states.flip(0),
                "columns shuffled": states[:, scrambled],
                "white": states.std() * torch.randn(states.shape, generator=generator),
                "one row repeated": states[half : half + 1].expand_as(states),
            }
            if another is not None:
                wrong["another model"] = _captured(another, input_ids=prompt, layer=layer).states
            for name, rows in wrong.items():
                noise = torch.randn(rows.shape, generator=generator)
                usual = float(states[1:].norm(dim=1).median()) / states.shape[1] ** 0.5  # root mean square of a row
                for share in (0.0, 0.5):
                    yield f"{layer} {name} {share} {number}", replace(own, states=rows + share * usual * noise), None


def summarise(records: list[dict[str, Any]]) -> list[Stated]:
    """Print what the lines of a run amount to, and return the posteriors of tokens tenth by tenth."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["case"].rpartition(" ")[0]].append(record)
    for name, group in groups.items():
        verdicts = dict(Counter(record["verdict"] for record in group))
        seconds = sum(record["seconds"] for record in group) / len(group)
        if group[0]["right"] is None:
            print(f"{name:32s} {len(group):3d} {verdicts}")
            continue
        rights = [right for record in group for right in record["right"]]
        probable = [all(r["right"]) for r in group if r["verdict"] == "probable"]
        print(
            f"{name:12s} {len(group):3d} prompts, tokens {sum(rights) / len(rights):.3f}, probable right "
            f"{sum(probable)} of {len(probable)}, {verdicts}, {seconds:.1f} s a prompt"
        )
    pairs = [pair for r in records if r["right"] for pair in zip(r["posteriors"], r["right"], strict=True)]
    stated = []
    for tenth in range(10):
        inside = [(p, right) for p, right in pairs if min(int(10 * p), 9) == tenth]
        if inside:
            n, mean, n_right = len(inside), sum(p for p, _ in inside) / len(inside), sum(right for _, right in inside)
            low, high = wilson(n_right, n)
            stated.append(Stated(mean=mean, right=n_right / n, low=low, high=high, n=n))
            print(f"posterior {tenth / 10:.1f}: {n:5d} tokens, stated {mean:.3f}, right {n_right / n:.3f}")
    return stated


if __name__ == "__main__":
    main()
