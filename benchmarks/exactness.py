"""Is every prompt recovered exactly? Kinds of prompt × layers, states from ordinary forward passes.

python -m benchmarks.exactness [--policy P] [--layers 1,15,final] [--kinds sentence,code] [--no-fit] [--tokens N]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

import sipit
from sipit.inversion import Inversion
from sipit.models import LanguageModel
from sipit.observations import Site

_SENTENCES = (
    "When the last ferry had left the harbour, Ingrid counted the coins in her pocket and decided to walk home.",
    "The committee will publish its findings on water quality in three coastal districts before the end of next month.",
)
_CODE = "def merge(left, right):\n    out = []\n    while left:\n        out.append(left.pop(0))\n    return out\n"
_SCRIPTS = "Grüße 😀 from 東京! Привет, мир 🌍 ¿qué tal? नमस्ते 🚀✨"


def prompts(lm: LanguageModel, n_tokens: int) -> dict[str, Tensor]:
    """Return one prompt of each kind, cut to at most n tokens."""
    generator = torch.Generator().manual_seed(7)
    newlines = torch.cat([lm.encode("The end.")[: n_tokens // 2], lm.encode("\n").repeat(n_tokens)])
    return {
        "sentence": lm.encode(_SENTENCES[0])[:n_tokens],
        "sentence 2": lm.encode(_SENTENCES[1])[:n_tokens],
        "code": lm.encode(_CODE)[:n_tokens],
        "random ids": torch.randint(lm.vocab_size, (n_tokens,), generator=generator),
        "repeated": lm.encode(" the")[-1:].repeat(n_tokens),
        "newlines": newlines[:n_tokens],
        "emoji and scripts": lm.encode(_SCRIPTS)[:n_tokens],
        "chat template": lm.encode("Who are you?", chat=True)[-n_tokens:],
    }


def main() -> int:
    """Print a line for each cut; exit 1 unless every prompt came back exactly with the verdict recovered."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--no-fit", action="store_true")
    parser.add_argument("--layers", default="1,8,15,22,29,30,final")
    parser.add_argument("--kinds", default="")
    parser.add_argument("--tokens", type=int, default=20)
    options = parser.parse_args()
    lm = sipit.load(options.model)
    chosen = {
        k: p for k, p in prompts(lm, options.tokens).items() if not options.kinds or k in options.kinds.split(",")
    }
    n_wrong = 0
    for name in options.layers.split(","):
        cut: tuple[int, Site] = (lm.n_layers, "final") if name == "final" else (int(name), "block")
        for kind, ids in chosen.items():
            seen = lm.capture(input_ids=ids, layer=cut[0], site=cut[1])
            started = time.perf_counter()
            found: Inversion = sipit.invert(lm, seen, policy=options.policy, use_fit=not options.no_fit)
            is_exact = found.input_ids == tuple(ids.tolist()) and found.verdict == "recovered"
            n_wrong += not is_exact
            print(
                f"{name:>6}  {kind:15} {'exact' if is_exact else 'NOT EXACT':10} {found.verdict:10} "
                f"{found.n_checked / len(ids):9.1f} candidates/token  ratio {found.prefill_ratio:8.2f}  "
                f"{time.perf_counter() - started:6.1f} s",
                flush=True,
            )
    print(f"{n_wrong} not exact")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
