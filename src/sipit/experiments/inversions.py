"""Prompts from all their rows, by every method (Tables 4, 5 and 7, Figure 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean, median, pstdev

import torch
from torch import Tensor

from sipit.baselines.hard_prompts import hard_prompts
from sipit.experiments.bench import bench, random_prompts
from sipit.experiments.experiment import Experiment, Setting, Task, Values
from sipit.experiments.paper import TABLE_4, TABLE_5, TABLE_7
from sipit.inversion import invert
from sipit.inversion.inverses.store import load_fit
from sipit.models.plain_pass import plain_seconds
from sipit.observations import Cut

_METHODS = ("auto", "auto-no-fit", "vocabulary-matching", "reference-sipit", "random", "hard-prompts")
_RANDOM_SHARE = 10  # one prompt of so many is of random ids


def _mixed(setting: Setting, n_prompts: int, n_tokens: int) -> list[Tensor]:
    """Return prompts of which 90 % are text and 10 % uniformly random ids, as the paper has them."""
    n_random = max(1, n_prompts // _RANDOM_SHARE)
    text = setting.prompts(n_prompts - n_random, [n_tokens]) if n_prompts > n_random else []
    return [*text, *random_prompts(setting.lm, n_tokens=n_tokens, n_prompts=n_random, seed=setting.seed)]


def _table(setting: Setting) -> Iterator[Task]:
    n_tokens = setting.of_scale(6, 20, 20)
    prompts = _mixed(setting, setting.of_scale(2, 20, 100), n_tokens)
    most = float(setting.of_scale(10, 20, 36_000))
    cut = Cut(max(1, setting.lm.n_layers // 2))
    for method in _METHODS:
        for number, ids in enumerate(prompts):

            def made(method: str = method, ids: Tensor = ids) -> Values:
                return _tried(setting, method, ids, cut, most)

            yield Task(key=f"{method} {number}", make=made)


def _tried(setting: Setting, method: str, ids: Tensor, cut: Cut, most: float) -> Values:
    lm = setting.lm
    if method != "hard-prompts":
        (run,) = bench(lm, [ids], cuts=[cut], methods=[method], seed=setting.seed, max_seconds=most)
        right = len(ids) if run.exact else None
        is_fitted = method == "auto" and load_fit(lm, cut) is not None
        about = {"method": method, "time_limit": most, "exact_tokens": right, "is_fitted": is_fitted}
        return {**asdict(run), **about}
    seen = lm.capture(input_ids=ids, layer=cut.layer, site=cut.site)
    found = hard_prompts(lm, seen, n_steps=setting.of_scale(20, 1000, 100_000), max_seconds=most, seed=setting.seed)
    plain = plain_seconds(lm, cut, len(ids))
    return {
        "method": method,
        "layer": cut.layer,
        "site": cut.site,
        "seq_len": len(ids),
        "exact": found.input_ids == tuple(ids.tolist()),
        "exact_tokens": sum(a == b for a, b in zip(found.input_ids, ids.tolist(), strict=True)),
        "seconds": found.seconds,
        "wall_ratio": found.seconds / max(plain, 1e-9),
        "n_passes": 3 * found.n_steps,
        "time_limit": most,
    }


def _long(setting: Setting) -> Iterator[Task]:
    n, n_tokens = setting.of_scale(1, 5, 50), setting.of_scale(16, 100, 100)
    cut = Cut(max(1, setting.lm.n_layers // 2))
    kinds = {
        "text": setting.prompts(n, [n_tokens]),
        "random": random_prompts(setting.lm, n_tokens=n_tokens, n_prompts=n, seed=setting.seed),
    }
    for name, prompts in kinds.items():
        yield Task(key=name, make=partial(_summary, setting, prompts, cut))


def _by_layer(setting: Setting) -> Iterator[Task]:
    n = setting.of_scale(1, 3, 20)
    lengths = [8] if setting.scale == "smoke" else [20, 50, 100, 200]
    prompts: dict[int, list[Tensor]] = {length: [] for length in lengths}
    drawn = setting.prompts(n * len(lengths), lengths)
    for ids in drawn:
        prompts[len(ids)].append(ids)
    for length in lengths:
        for cut in setting.cuts():
            yield Task(
                key=f"{cut}, {length} tokens",
                make=partial(_summary, setting, prompts[length], cut),
            )


def _share(setting: Setting) -> Iterator[Task]:
    n, n_tokens = setting.of_scale(1, 5, 50), setting.of_scale(6, 10, 10)
    prompts, cut = setting.prompts(n, [n_tokens]), Cut(max(1, setting.lm.n_layers // 2))
    yield Task(key="auto, no fit", make=lambda: _summary(setting, prompts, cut, use_fit=False))


def _summary(setting: Setting, prompts: Sequence[Tensor], cut: Cut, *, use_fit: bool = True) -> Values:
    lm = setting.lm
    runs = []
    for ids in prompts:
        seen = lm.capture(input_ids=ids, layer=cut.layer, site=cut.site)
        runs.append((invert(lm, seen, use_fit=use_fit), tuple(ids.tolist())))
    seconds = [found.seconds for found, _ in runs]
    tried = [position.n_checked / lm.vocab_size for found, _ in runs for position in found.positions]
    return {
        "layer": cut.layer,
        "site": cut.site,
        "n_prompts": len(runs),
        "seq_len": len(prompts[0]),
        "n_exact": sum(found.verdict == "recovered" and found.input_ids == ids for found, ids in runs),
        "seconds": fmean(seconds),
        "seconds_deviation": pstdev(seconds),
        "wall_ratio": median(found.wall_ratio for found, _ in runs),
        "prefill_ratio": median(found.prefill_ratio for found, _ in runs),
        "n_passes": median(found.n_passes for found, _ in runs),
        "share_of_vocabulary": fmean(tried) if tried else None,
        "vocab_size": lm.vocab_size,
        "is_fitted": use_fit and load_fit(lm, cut) is not None,
        "threads": torch.get_num_threads(),
    }


INVERSION = Experiment(
    name="inversion",
    answers="Table 5",
    claim="every prompt is recovered exactly, far faster than by brute force, which HardPrompts never does",
    paper="GPT-2: SIPIT in 28.0 s and BruteForce in 3,889.6 s are always right, HardPrompts in 6,132.6 s never",
    paper_table=TABLE_5,
    tasks=_table,
    paper_models=("openai-community/gpt2",),
    paper_needs="4 GB; with brute force 100 hours on one GPU",
)
LONG = Experiment(
    name="long-prompts",
    answers="Table 7",
    claim="prompts of 100 tokens are recovered exactly",
    paper="GPT-2: all exact, in 107 to 146 s",
    paper_table=TABLE_7,
    tasks=_long,
    paper_models=("openai-community/gpt2",),
    paper_needs="4 GB, minutes",
)
SHARE = Experiment(
    name="vocabulary-share",
    answers="Table 4",
    claim="a small share of the vocabulary is tried at a position",
    paper="0.19 % of 32,000 and 0.21 % of 128,255 tokens, all prompts exact",
    paper_table=TABLE_4,
    tasks=_share,
    paper_models=("mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3.1-8B"),
    paper_needs="16 GB of GPU memory (--quantize nf4), an hour a model",
)
BY_LAYER = Experiment(
    name="time-by-layer",
    answers="Figure 6",
    claim="time hardly depends on the layer",
    paper="nearly flat over layers at 20 to 200 tokens: the reference runs the whole model whatever the layer",
    tasks=_by_layer,
    paper_models=("openai-community/gpt2",),
    paper_needs="4 GB, an hour",
)
