"""Seconds of inverting over seconds of the plain forward pass through the same blocks: wall_ratio, by layer and length.

    python -m benchmarks.wall --text-file F [--no-fit] [--tokens 20,64,256] [--layers 5,15,25,30,final] [--prompts 5]

Each cell is the median over the prompts, one after the other on as many threads as torch has; the plain pass is timed
anew beside each inversion. What a process or a layer needs once is made before, by one inversion that does not count,
unless --cold. In brackets prefill_ratio and the number of passes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import sipit
from sipit import LanguageModel
from sipit.experiments.bench import prompts_from_text
from sipit.observations import Cut

_SHOWN = ("wall_ratio", "prefill_ratio", "n_passes")
_PLAIN = 3  # plain passes before and after each inversion, of which the median counts


def main() -> int:
    """Print the table; exit 1 unless every prompt came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="5,15,25,30,final")
    parser.add_argument("--tokens", default="20,64,256")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--random", action="store_true", help="uniform random ids in place of text")
    parser.add_argument("--no-fit", action="store_true")
    parser.add_argument("--cold", action="store_true", help="count the first inversion of a layer too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, help="a line for each inversion")
    options = parser.parse_args()
    lm = sipit.load(options.model, device=options.device, dtype=options.dtype)
    text = options.text_file.read_text("utf-8")
    n_missed, lines = 0, []
    for n_tokens in map(int, options.tokens.split(",")):
        prompts = _prompts(lm, text, n_tokens, options.prompts, options.random)
        for name in options.layers.split(","):
            cut = lm.final_cut if name == "final" else Cut(int(name))
            runs = [
                _run(lm, ids, cut, not options.no_fit) for ids in (prompts if options.cold else [prompts[0], *prompts])
            ]
            runs = runs if options.cold else runs[1:]
            n_missed += sum(not run["exact"] for run in runs)
            lines += [json.dumps({"tokens": n_tokens, "layer": name, **run}) for run in runs]
            wall, prefill, passes = (
                median(run[key] for run in runs) for key in ("wall_ratio", "prefill_ratio", "n_passes")
            )
            print(f"{n_tokens:5d} tokens, layer {name:>5}: {wall:6.2f} ({prefill:.2f}, {passes:.0f})", flush=True)
    if options.json is not None:
        options.json.write_text("\n".join(lines) + "\n", "utf-8")
    print("every prompt exact" if not n_missed else f"{n_missed} NOT EXACT")
    return 1 if n_missed else 0


def _prompts(lm: LanguageModel, text: str, n_tokens: int, n: int, is_random: bool) -> list[Tensor]:
    if is_random:
        generator = torch.Generator().manual_seed(n_tokens)
        return list(torch.randint(lm.vocab_size, (n, n_tokens), generator=generator))
    return prompts_from_text(lm, text, n_tokens=n_tokens, n_prompts=n)


def _run(lm: LanguageModel, ids: Tensor, cut: Cut, use_fit: bool) -> dict[str, float]:
    seen = lm.capture(input_ids=ids, layer=cut.layer, site=cut.site)
    model = lm.cut(cut, seq_len=len(ids))
    plain = [_plain(model.ordinary, ids) for _ in range(_PLAIN)]
    found = sipit.invert(lm, seen, use_fit=use_fit)
    plain += [_plain(model.ordinary, ids) for _ in range(_PLAIN)]
    return {
        "exact": found.verdict == "recovered" and found.input_ids == tuple(ids.tolist()),
        "seconds": found.seconds,
        "plain_seconds": median(plain),
        "wall_ratio": found.seconds / median(plain),
        "prefill_ratio": found.prefill_ratio,
        "n_passes": found.n_passes,
    }


def _plain(run: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    started = time.perf_counter()
    run(ids).sum().item()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
