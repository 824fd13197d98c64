"""One script for a GPU, in under five minutes: does it give the CPU's answers, how fast, in how much memory?

    python -m benchmarks.device [--device cuda] [--model smollm2-135m] [--shape llama-8b] [--out RECORD.json]

Seconds of inverting over seconds of the plain forward pass (wall_ratio) in float32 and bfloat16 at five layers, with
the fitted inverse where the cache holds one. Then prompts of library prose are inverted on the device and on the CPU:
token ids and verdicts must be the same. Then random ids in a model of random weights and a large shape in bfloat16,
which is left out where memory lacks, and the five layers without a fit. The record is kept after each row; what takes
longer than --seconds is left out, and the record says so. It exits 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import sipit
from sipit.corpora import library_prose
from sipit.experiments.bench import bench, prompts_from_text, random_prompts
from sipit.experiments.record import dated_head
from sipit.inversion.inverses.store import fit_path
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.storage import write_json

_SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
}
_BYTES_A_WEIGHT = 2  # bfloat16
_ROOM = 1.5  # times the weights that must be free: the vocabulary's keys and the passes' activations lie beside them
_PACKAGES = ("argparse", "datetime", "logging", "statistics")  # whose docstrings are the prompts
_CHARACTERS_A_TOKEN = 12  # of text taken for each token wanted, at least


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the record, and write it to --out; exit 1 unless the device gave the CPU's answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=[*_SHAPES, "none"], default="llama-8b")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=280.0, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.seconds
    lm = sipit.load(options.model, device=options.device, dtype="float32")
    device, prompts = lm.device, _prose(lm, options.tokens, options.prompts)
    record: dict[str, Any] = {**dated_head(lm), "processor": _processor(device), "left_out": []}

    def fill(key: str, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Add rows while there is time, and keep the record after each; what comes after is named in it."""
        table: list[Any] = record.setdefault(key, [])
        left = rows() if time.monotonic() < ends else iter(())
        while time.monotonic() < ends:
            row = next(left, None)
            if row is None:
                return
            (record["left_out"] if "left_out" in row else table).append(row.get("left_out", row))
            record["peak_bytes"] = _peak_bytes(device)
            record["seconds"] = round(options.seconds - (ends - time.monotonic()), 1)
            if options.out is not None:
                write_json(options.out, record)
        record["left_out"].append(f"what {key} had left: --seconds ran out")

    def in_dtype(dtype: str) -> LanguageModel:
        return sipit.load(options.model, device=options.device, dtype=dtype)

    fill("speed", lambda: _speed(lm, prompts, is_fitted=True))
    fill("speed", lambda: _speed(in_dtype("bfloat16"), prompts, is_fitted=True))
    fill("same_answers", lambda: _same_answers(sipit.load(options.model, device="cpu", dtype="float32"), lm, prompts))
    if options.shape != "none":
        fill("random_weights", lambda: _of_shape(options.shape, device, options.tokens))
    fill("speed", lambda: _speed(lm, prompts, is_fitted=False))
    fill("speed", lambda: _speed(in_dtype("bfloat16"), prompts, is_fitted=False))
    print(json.dumps(record, indent=2))
    if options.out is not None:
        write_json(options.out, record)
    return 0 if all(one["same"] == one["prompts"] for one in record["same_answers"]) else 1


def _cuts(lm: LanguageModel) -> list[Cut]:
    n = lm.n_layers
    return [*(Cut(layer) for layer in sorted({max(1, n // 6), n // 2, max(1, 5 * n // 6), n})), lm.final_cut]


def _prose(lm: LanguageModel, n_tokens: int, n_prompts: int) -> list[Tensor]:
    wanted, text = _CHARACTERS_A_TOKEN * n_tokens * n_prompts, ""
    for piece in library_prose(seed=11, only=_PACKAGES):
        text += piece
        if len(text) > wanted:
            break
    return prompts_from_text(lm, text, n_tokens=n_tokens, n_prompts=n_prompts)


def _same_answers(on_cpu: LanguageModel, lm: LanguageModel, prompts: Sequence[Tensor]) -> Iterator[dict[str, Any]]:
    """Compare what both make of the states that the CPU left, a layer at a time."""
    for cut in _cuts(lm):
        pairs = []
        for ids in prompts:
            seen = on_cpu.capture(input_ids=ids, layer=cut.layer, site=cut.site)
            pairs.append((sipit.invert(on_cpu, seen), sipit.invert(lm, seen)))
        yield {
            "cut": cut.label,
            "prompts": len(pairs),
            "same": sum((a.verdict, a.input_ids) == (b.verdict, b.input_ids) for a, b in pairs),
            "recovered": sum(b.verdict == "recovered" for _, b in pairs),
        }


def _speed(lm: LanguageModel, prompts: Sequence[Tensor], *, is_fitted: bool) -> Iterator[dict[str, Any]]:
    """Yield the medians of each layer, of those with a fit or without one; what a layer needs once aside."""
    for cut in _cuts(lm):
        if is_fitted and not fit_path(lm, cut).is_file():
            continue
        method = "auto" if is_fitted else "auto-no-fit"
        runs = list(bench(lm, [prompts[0], *prompts], cuts=[cut], methods=[method]))[1:]
        yield {
            "cut": cut.label,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "is_fitted": is_fitted,
            "tokens": runs[0].seq_len,
            "prompts": len(runs),
            "exact": sum(run.exact for run in runs),
            **{
                key: median(getattr(run, key) for run in runs)
                for key in ("wall_ratio", "prefill_ratio", "n_passes", "seconds", "prefill_seconds")
            },
        }


def _of_shape(name: str, device: torch.device, n_tokens: int) -> Iterator[dict[str, Any]]:
    """Yield the medians of a model of random weights in bfloat16, at a layer near the first and in the middle."""
    config = LlamaConfig(**_SHAPES[name])
    with torch.device("meta"):
        n_weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    needed = int(_ROOM * _BYTES_A_WEIGHT * n_weights)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    if name != "tiny" and (free is None or free < needed):
        have = "no memory of a GPU" if free is None else f"{free / 1e9:.0f} GB free"
        yield {"left_out": f"{name}: it takes {needed / 1e9:.0f} GB, and there is {have}"}
        return
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    lm = LanguageModel(model, name=f"{name} of random weights")
    prompts = random_prompts(lm, n_tokens=n_tokens, n_prompts=2, seed=1)
    for layer in (lm.n_layers // 8 or 1, lm.n_layers // 2):
        runs = list(bench(lm, [prompts[0], *prompts], cuts=[Cut(layer)], methods=["auto"]))[1:]
        yield {
            "shape": name,
            "weights": n_weights,
            "cut": str(layer),
            "tokens": n_tokens,
            "prompts": len(runs),
            "exact": sum(run.exact for run in runs),
            "verdicts": [run.verdict for run in runs],
            "wall_ratio": median(run.wall_ratio for run in runs),
            "n_passes": median(run.n_passes for run in runs),
            "seconds": median(run.seconds for run in runs),
        }


def _processor(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


if __name__ == "__main__":
    raise SystemExit(main())
