"""How private is layer k of my split? Invert one prompt's states at several layers and compare.

    python examples/audit_a_split.py
    python examples/audit_a_split.py --model smollm2-135m --layers 1 5 15 29 --text "Meet me at nine."

A split that sends the states after k blocks off the device hands out whatever this prints in row k.
"right" counts the leading tokens that equal the prompt's. "× prefill" is the work of the search over that
of computing the states once; what is prepared once per layer is charged to its row. A fitted inverse is used at
layers that have one in the cache directory ("sipit fit") and changes the cost only.

A prompt that is not recovered is not thereby safe: the verdict says what this search did.
"""

from __future__ import annotations

import argparse

import sipit

TEXT = "Dear Dr Okafor, the biopsy of 12 May was clear. Please tell my husband, not the insurer."


def main() -> None:
    """Print a table of verdict, tokens recovered and cost by layer."""
    parser = argparse.ArgumentParser(description="How private is layer k of my split?")
    parser.add_argument("--model", default="smollm2-135m", help="pinned model, folder, .gguf file or hub id")
    parser.add_argument("--layers", type=int, nargs="+", metavar="K", help="blocks run on the device (default: spread)")
    parser.add_argument("--text", default=TEXT, help="the prompt to try")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="what the split sends")
    options = parser.parse_args()

    lm = sipit.load(options.model)
    layers = options.layers or sorted({1, lm.n_layers // 4, lm.n_layers // 2, 3 * lm.n_layers // 4, lm.n_layers})
    truth = lm.encode(options.text).tolist()
    print(f"{lm.name}: {lm.n_layers} blocks; prompt of {len(truth)} tokens")
    print(f"{'layer':>5}  {'verdict':<10}  {'right':>9}  {'checked':>8}  {'× prefill':>9}  {'seconds':>8}")
    for layer in layers:
        seen = lm.capture(options.text, layer=layer, dtype=options.dtype)
        found = sipit.invert(lm, seen)
        same = [a == b for a, b in zip(found.input_ids, truth, strict=False)]
        tokens = f"{[*same, False].index(False)}/{len(truth)}"
        cost = f"{found.n_checked:>8}  {found.prefill_ratio:>9.1f}  {found.seconds:>8.1f}"
        print(f"{layer:>5}  {found.verdict:<10}  {tokens:>9}  {cost}")


if __name__ == "__main__":
    main()
