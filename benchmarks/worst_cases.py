"""What goes wrong costs how much: a wrong layer, by policy, and the hardest position of long texts.

    python -m benchmarks.worst_cases --text-file F [--layers 5,15,30] [--texts 20] [--tokens 1024] [--text-layer 15]

A miss: the states of the next layer (of the last one: those behind the final norm) given as this layer's. Beside the
seconds stand the tokens run, which are the same on every machine. A long text counts as stuck where one position took
more candidates than an eighth of the vocabulary. Exit 1 unless every miss is a miss and every text exact.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Literal

import sipit
from sipit import LanguageModel, Observation
from sipit.experiments.bench import prompts_from_text
from sipit.observations import Cut

_TOKENS = 20  # of the prompt whose layer is wrong


def wrong_layer(lm: LanguageModel, text: str, layer: int) -> bool:
    """Print what a wrong layer costs under both policies; return whether both say unmatched."""
    ids = prompts_from_text(lm, text, n_tokens=_TOKENS, n_prompts=1)[0]
    true = Cut(layer + 1) if layer < lm.n_layers else lm.final_cut
    seen = Observation(states=lm.capture(input_ids=ids, layer=true.layer, site=true.site).states, layer=layer)
    sipit.invert(lm, lm.capture(input_ids=ids, layer=layer))  # makes what a layer needs once
    cost: dict[str, tuple[float, int]] = {}
    policies: tuple[Literal["vocabulary", "auto"], ...] = ("vocabulary", "auto")
    is_missed = True
    for policy in policies:
        started = time.perf_counter()
        found = sipit.invert(lm, seen, policy=policy)
        cost[policy] = time.perf_counter() - started, found.block_tokens // layer
        is_missed &= found.miss is not None
    said = found.miss.diagnosis if found.miss is not None else found.verdict
    ratios = [cost["auto"][i] / cost["vocabulary"][i] for i in (0, 1)]
    print(
        f"{true} given as layer {layer}: vocabulary {cost['vocabulary'][0]:.1f} s, auto {cost['auto'][0]:.1f} s, "
        f"{ratios[0]:.2f} times the seconds, {ratios[1]:.2f} times the tokens run; {said}",
        flush=True,
    )
    return is_missed


def long_texts(lm: LanguageModel, text: str, n_texts: int, n_tokens: int, layer: int) -> bool:
    """Print how hard the hardest positions of some texts were; return whether all came back."""
    hardest, passes, is_exact = [], [], True
    for ids in prompts_from_text(lm, text, n_tokens=n_tokens, n_prompts=n_texts):
        found = sipit.invert(lm, lm.capture(input_ids=ids, layer=layer))
        is_exact &= found.input_ids == tuple(ids.tolist())
        hardest.append(max(p.n_checked for p in found.positions))
        passes.append(found.n_passes)
    n_stuck = sum(n > lm.vocab_size // 8 for n in hardest)
    print(
        f"{len(hardest)} texts of {n_tokens} tokens, layer {layer}: {'all exact' if is_exact else 'NOT ALL EXACT'}, "
        f"{n_stuck} stuck; most candidates at one position {max(hardest)}, in the median of the texts "
        f"{median(hardest):.0f}; passes {median(passes):.0f} in the median, {max(passes)} at most",
        flush=True,
    )
    return is_exact


def main() -> int:
    """Print both tables; exit 1 if one says what it should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="5,15,30")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--text-layer", type=int, default=15)
    options = parser.parse_args()
    lm = sipit.load(options.model)
    text = options.text_file.read_text("utf-8")
    is_right = [wrong_layer(lm, text, int(layer)) for layer in options.layers.split(",") if layer]
    if options.texts:
        is_right.append(long_texts(lm, text, options.texts, options.tokens, options.text_layer))
    return 0 if all(is_right) else 1


if __name__ == "__main__":
    raise SystemExit(main())
