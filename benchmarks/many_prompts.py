"""Many prompts one after the other beside the same ones sharing their packed passes, in turn, in one process.

    python -m benchmarks.many_prompts --text-file F --layer 15 --layer 30 --tokens 20 --prompts 32 [--no-fit]

The captures, the noise floor and what a layer needs once are made before the clock starts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import sipit
from sipit.experiments.bench import prompts_from_text
from sipit.inversion import SearchOptions
from sipit.inversion.invert import N_SLOTS
from sipit.inversion.search.batching import search_together


def main() -> int:
    """Print a line for each layer; exit 1 unless every prompt came back both ways."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--layer", type=int, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--slots", type=int, default=N_SLOTS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--no-fit", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lm = sipit.load(options.model)
    text = options.text_file.read_text(encoding="utf-8")
    prompts = prompts_from_text(lm, text, n_tokens=options.tokens, n_prompts=options.prompts)
    expected = [tuple(ids.tolist()) for ids in prompts]
    all_exact = True
    for layer in options.layer:
        seen = [lm.capture(input_ids=ids, layer=layer) for ids in prompts]
        sipit.invert(lm, seen[0], use_fit=not options.no_fit)  # what a layer needs once
        seconds: dict[int, list[float]] = {1: [], options.slots: []}
        ratio = {}
        for _ in range(options.repeats):
            for n_slots, times in seconds.items():
                started = time.perf_counter()
                found = list(search_together(lm, seen, SearchOptions(use_fit=not options.no_fit), n_slots=n_slots))
                times.append(time.perf_counter() - started)
                ratio[n_slots] = statistics.mean(f.prefill_ratio for f in found)
                all_exact &= [f.input_ids for f in found] == expected
        alone, shared = (statistics.median(times) / len(seen) for times in seconds.values())
        gain = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
        print(
            f"layer {layer}, {options.prompts} prompts x {options.tokens} tokens: one by one {alone:.3f} s a prompt "
            f"(prefill_ratio {ratio[1]:.2f}), {options.slots} sharing passes {shared:.3f} s "
            f"({ratio[options.slots]:.2f}): {gain:.2f} times faster",
            flush=True,
        )
    print("every prompt exact" if all_exact else "NOT EXACT")
    return 0 if all_exact else 1


if __name__ == "__main__":
    raise SystemExit(main())
