"""The published ways beside ours, in one run: the same observations, one process, the same threads.

    python -m benchmarks.peers --text-file F [--layers 5,15,30] [--tokens 20] [--prompts 3] [--seconds 60] [--json FILE]

Vocabulary matching (arXiv 2505.18332) tries the vocabulary by the model's own likelihood, which the whole model gives
behind the tokens found so far, in batches that share the cached prefix, until a token fits; reference SIPIT (arXiv
2510.15511) descends on an embedding and tries the tokens nearest to it. Both are given our packed checks, so what is
compared is the order of the candidates. A search over --seconds a prompt is stopped and counts as not exact.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sipit
from sipit.experiments.bench import METHODS, bench, bench_record, prompts_from_text, table
from sipit.observations import Cut
from sipit.storage import write_json

_OURS = ("auto", "auto-no-fit")
_PEERS = ("vocabulary-matching", "reference-sipit")


def main() -> int:
    """Print a table; exit 1 unless every prompt came back by our own ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="5,15,30")
    parser.add_argument("--methods", default=",".join((*_OURS, *_PEERS)), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="most for one prompt by one method")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    lm = sipit.load(options.model)
    text = options.text_file.read_text("utf-8")
    prompts = prompts_from_text(lm, text, n_tokens=options.tokens, n_prompts=options.prompts)
    cuts = [lm.final_cut if name == "final" else Cut(int(name)) for name in options.layers.split(",")]
    methods = options.methods.split(",")
    runs = []
    for cut in cuts:
        # What a layer needs once, a fit that has to be read included, is made by a first inversion that does not count.
        for method in methods:
            if method in _OURS:
                list(bench(lm, prompts[:1], cuts=[cut], methods=[method]))
        runs += list(bench(lm, prompts, cuts=[cut], methods=methods, max_seconds=options.seconds))
    print(table(runs))
    if options.json is not None:
        write_json(options.json, bench_record(lm, runs))
    return 0 if all(run.exact for run in runs if run.method in _OURS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
