"""Inversion of one long document beside the plain forward pass through the same blocks, with its peak memory.

    python -m benchmarks.long_prompt --text-file F --tokens 1024 4096 [--layer 15] [--no-fit]

Each length in a process of its own. The measured noise floor, once a process, is timed apart. Linux only for memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import sipit
from sipit.experiments.bench import prompts_from_text
from sipit.inversion.judging.noise import noise_floor
from sipit.observations import Cut


def measure(options: argparse.Namespace, n_tokens: int) -> int:
    """Invert the first tokens of the text in this process; return 0 if they came back."""
    lm = sipit.load(options.model)
    text = options.text_file.read_text(encoding="utf-8")
    ids = prompts_from_text(lm, text, n_tokens=n_tokens, n_prompts=1)[0]
    seen = lm.capture(input_ids=ids, layer=options.layer)
    cut = lm.cut(Cut(options.layer))
    plain = []
    for _ in range(3):
        started = time.perf_counter()
        cut.ordinary(ids)
        plain.append(time.perf_counter() - started)
    started = time.perf_counter()
    noise_floor(lm, Cut(options.layer, "block"))
    calibration = time.perf_counter() - started
    runs = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        found = sipit.invert(lm, seen, use_fit=not options.no_fit)
        runs.append(time.perf_counter() - started)
    is_exact = found.input_ids == tuple(ids.tolist())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds, prefill = statistics.median(runs), statistics.median(plain)
    print(
        f"{n_tokens} tokens, layer {options.layer}: {'exact' if is_exact else 'NOT EXACT'}, {found.verdict}, "
        f"prefill_ratio {found.prefill_ratio:.2f}, {seconds:.1f} s = "
        f"{seconds / prefill:.1f} times the plain pass of {prefill:.2f} s "
        f"(the first search {runs[0]:.1f} s; noise floor {calibration:.1f} s once), peak {peak:.2f} GB in all",
        flush=True,
    )
    return 0 if is_exact else 1


def main() -> int:
    """Print a line for each length; exit 1 unless all are exact."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--no-fit", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if len(options.tokens) == 1:
        return measure(options, options.tokens[0])
    flags = ["--layer", str(options.layer), "--model", options.model, "--repeats", str(options.repeats)]
    flags += ["--no-fit"] if options.no_fit else []
    program = [sys.executable, "-m", "benchmarks.long_prompt", "--text-file", str(options.text_file), *flags]
    return max(subprocess.run([*program, "--tokens", str(n)]).returncode for n in options.tokens)


if __name__ == "__main__":
    raise SystemExit(main())
