"""What leaks at any site, rounded in any way, inverted: exact share, candidates a token and time over a plain pass.

python -m benchmarks.leaks --text-file F --layers 5,15,30 --roundings bfloat16,float8-row,int8-row,int4-64 --prompts 50
python -m benchmarks.leaks --text-file F --layers 1,15,29 --sites keys,values,kv --prompts 20
python -m benchmarks.leaks --text-file F --layers 1,5,15,30 --pass-dtype bfloat16 --prompts 10
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import sipit
from sipit.models import in_pass
from sipit.observations.rounding import as_rounded


def _integers(group: int | None, most: int) -> Callable[[Tensor], Tensor]:
    def rounded(values: Tensor) -> Tensor:
        groups = values.reshape(len(values) if group is None else -1, values.shape[1] if group is None else group)
        step = groups.abs().amax(dim=1, keepdim=True) / most
        return ((groups / step).round() * step).reshape(values.shape)

    return rounded


def _float8_row(values: Tensor) -> Tensor:
    scale = values.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "bfloat16": lambda values: values.bfloat16().float(),
    "float8-row": _float8_row,
    "int8-row": _integers(None, 127),
    "int4-64": _integers(64, 7),
    "int4-32": _integers(32, 7),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--layers", default="15", help="of sites that have several")
    parser.add_argument("--sites", default="block")
    parser.add_argument("--roundings", default="none")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dtype", default="auto", help="of the weights that the states are inverted with")
    parser.add_argument("--pass-dtype", help="what the pass that leaves the states computes in (default: --dtype)")
    parser.add_argument("--fit", action="store_true", help="use fitted inverses that are there")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="give a prompt up after so long")
    options = parser.parse_args()
    lm = sipit.load(options.model, dtype=options.dtype)
    leaking = lm if options.pass_dtype is None else in_pass(lm, options.pass_dtype)
    ids = [int(i) for i in lm.encode(options.text_file.read_text("utf-8")[: 20 * options.prompts * options.tokens])]
    prompts = [ids[k * options.tokens :][: options.tokens] for k in range(options.prompts)]
    print("site           layer  rounding     exact     candidates/token  wall ratio  verdicts")
    for site in options.sites.split(","):
        layers = options.layers.split(",") if site in ("block", "kv", "keys", "values") or "block" in site else [None]
        for layer in layers:
            for rounding in options.roundings.split(","):
                _row(lm, leaking, prompts, site, None if layer is None else int(layer), rounding, options)


class _OutOfTimeError(Exception):
    """A prompt has had its seconds."""


def _row(
    lm: sipit.LanguageModel,
    leaking: sipit.LanguageModel,
    prompts: list[list[int]],
    site: str,
    layer: int | None,
    rounding: str,
    options: argparse.Namespace,
) -> None:
    verdicts: Counter[str] = Counter()
    exact = n_checked = n_tokens = 0
    ratios: list[float] = []
    for k, prompt in enumerate(prompts):
        began = time.perf_counter()
        seen = leaking.capture(input_ids=prompt, layer=layer, site=site)  # type: ignore[arg-type]
        plain = time.perf_counter() - began
        values, _, half_step = as_rounded(ROUNDINGS[rounding](seen.states), is_embedding=layer == 0)
        began = time.perf_counter()
        found = _inverted(lm, replace(seen, states=values, half_step=half_step), options)
        seconds = time.perf_counter() - began
        ratios.append(seconds / plain)
        verdict = "out of time" if found is None else found.verdict
        verdicts[verdict] += 1
        if found is not None:
            exact += list(found.input_ids) == prompt
            n_checked += found.n_checked
            n_tokens += len(prompt)
            if found.miss is not None:
                print(f"position {found.miss.position}: {found.miss.diagnosis}", file=sys.stderr)
        print(f"prompt {k} at {layer}, {rounding}: {verdict}, {exact} exact so far, {seconds:.1f} s", file=sys.stderr)
    n_run = max(n_tokens, 1)
    print(
        f"{site:13s}  {'-' if layer is None else layer:>5}  {rounding:11s}  {exact:3d} of {len(prompts):<3d}"
        f"{n_checked / n_run:14.1f}  {median(ratios):16.1f}  {dict(verdicts)}",
        flush=True,
    )


def _inverted(lm: sipit.LanguageModel, seen: sipit.Observation, options: argparse.Namespace) -> sipit.Inversion | None:
    deadline = time.perf_counter() + options.max_seconds

    def stop(_: object) -> None:
        if time.perf_counter() > deadline:
            raise _OutOfTimeError

    try:
        return sipit.invert(lm, seen, use_fit=options.fit, pass_dtype=options.pass_dtype, on_progress=stop)
    except _OutOfTimeError:
        return None


if __name__ == "__main__":
    main()
