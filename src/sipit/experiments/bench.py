"""Methods of inversion side by side: the same observations, one process, the same threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from sipit.baselines import random_order, reference_sipit, vocabulary_matching
from sipit.errors import InputError, OptionError
from sipit.experiments.record import record_head
from sipit.inversion import Inversion, OnProgress, Progress, invert
from sipit.inversion.judging.noise import noise_floor
from sipit.models import LanguageModel
from sipit.models.plain_pass import plain_seconds
from sipit.observations import Cut, Observation

Method = Callable[..., Inversion]


def _auto(lm: LanguageModel, seen: Observation, *, seed: int, on_progress: OnProgress | None) -> Inversion:
    return invert(lm, seen, policy="auto", seed=seed, on_progress=on_progress)


def _auto_no_fit(lm: LanguageModel, seen: Observation, *, seed: int, on_progress: OnProgress | None) -> Inversion:
    return invert(lm, seen, policy="auto", use_fit=False, seed=seed, on_progress=on_progress)


METHODS: dict[str, Method] = {
    "auto": _auto,
    "auto-no-fit": _auto_no_fit,
    "vocabulary-matching": vocabulary_matching,
    "reference-sipit": reference_sipit,
    "random": random_order,
}


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """One prompt inverted by one method at one layer."""

    method: str
    layer: int
    site: str
    prompt: int  # number of the prompt
    seq_len: int  # tokens
    exact: bool  # the recovered ids equal the prompt's
    verdict: str  # "stopped" where the time limit ended the search
    seconds: float
    block_tokens: int
    wall_ratio: float  # seconds over prefill_seconds
    prefill_ratio: float
    n_passes: int
    n_checked: int
    prefill_seconds: float  # of one ordinary forward pass of as many tokens through the same blocks


class _TimeUpError(Exception):
    """Ends a search at the time limit, carrying where it stood."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress


def prompts_from_text(lm: LanguageModel, text: str, *, n_tokens: int, n_prompts: int) -> list[Tensor]:
    """Return prompts of exact length, spread evenly over a text. n_prompts of (n_tokens,).

    Raises:
        InputError: the text is too short for that many prompts without overlap.
    """
    ids = lm.encode(text)
    if len(ids) < n_tokens * n_prompts:
        raise InputError(
            f"the text gives {len(ids)} tokens, too few for {n_prompts} prompts of {n_tokens}; "
            "pass a longer text, or fewer or shorter prompts"
        )
    stride = (len(ids) - n_tokens) // max(n_prompts - 1, 1)
    return [ids[i * stride : i * stride + n_tokens] for i in range(n_prompts)]


def random_prompts(lm: LanguageModel, *, n_tokens: int, n_prompts: int, seed: int) -> list[Tensor]:
    """Return prompts of uniformly random token ids. n_prompts of (n_tokens,)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(lm.vocab_size, (n_tokens,), generator=generator) for _ in range(n_prompts)]


def bench(
    lm: LanguageModel,
    prompts: Sequence[Tensor],
    *,
    cuts: Sequence[Cut],
    methods: Sequence[str],
    seed: int = 0,
    max_seconds: float = float("inf"),
) -> Iterator[BenchRun]:
    """Yield a run for every cut, prompt and method, as each is done.

    What a method prepares once per model and layer is charged to the first prompt it inverts there; the
    noise floor, which all of them need, is measured before.

    Args:
        lm: the model.
        prompts: token ids of each prompt.
        cuts: (layer, site) pairs.
        methods: names from METHODS.
        seed: of the random draws.
        max_seconds: most seconds for one prompt; a search over it is recorded as not exact.

    Raises:
        OptionError: an unknown method.
    """
    require_methods(methods)
    for cut in cuts:
        for number, ids in enumerate(prompts):
            noise_floor(lm, cut, len(ids))  # once a process, whatever the method
            seen = lm.capture(input_ids=ids, layer=cut.layer, site=cut.site)
            prefill_seconds = plain_seconds(lm, cut, len(ids))
            for name in methods:
                yield _run(
                    lm,
                    seen,
                    ids,
                    name=name,
                    number=number,
                    seed=seed,
                    max_seconds=max_seconds,
                    prefill_seconds=prefill_seconds,
                )


def _run(
    lm: LanguageModel,
    seen: Observation,
    ids: Tensor,
    *,
    name: str,
    number: int,
    seed: int,
    max_seconds: float,
    prefill_seconds: float,
) -> BenchRun:
    def watch(progress: Progress) -> None:
        if progress.seconds > max_seconds:
            raise _TimeUpError(progress)

    seq_len = len(ids)
    try:
        found = METHODS[name](lm, seen, seed=seed, on_progress=watch)
        exact = found.input_ids == tuple(ids.tolist())
        outcome: Any = (found.verdict, found.seconds, found.block_tokens, found.n_checked, found.n_passes)
    except _TimeUpError as stop:
        exact, at = False, stop.progress
        outcome = ("stopped", at.seconds, at.block_tokens, at.n_checked, at.n_passes)
    verdict, seconds, block_tokens, n_checked, n_passes = outcome
    return BenchRun(
        method=name,
        layer=seen.layer,
        site=seen.site,
        prompt=number,
        seq_len=seq_len,
        exact=exact,
        verdict=verdict,
        seconds=seconds,
        block_tokens=block_tokens,
        wall_ratio=seconds / prefill_seconds,
        n_passes=n_passes,
        prefill_ratio=block_tokens / (seq_len * max(seen.layer, 1)),
        n_checked=n_checked,
        prefill_seconds=prefill_seconds,
    )


def require_methods(methods: Sequence[str]) -> None:
    """Refuse a method that is not there.

    Raises:
        OptionError: an unknown method.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise OptionError(f"method {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}")


def table(runs: Sequence[BenchRun]) -> str:
    """Return a table for each layer and method: the median wall_ratio, the means of the rest."""
    head = f"{'layer':>8}  {'method':20} {'exact':>7} {'wall ratio':>11} {'prefills':>9} {'passes':>7} "
    head += f"{'seconds':>9} {'checked':>9}"
    lines = [head]
    groups: dict[tuple[str, str], list[BenchRun]] = {}
    for run in runs:
        layer = "final" if run.site == "final" else str(run.layer)
        groups.setdefault((layer, run.method), []).append(run)
    for (layer, method), group in groups.items():
        n = len(group)
        exact = f"{sum(r.exact for r in group)}/{n}"
        lines.append(
            f"{layer:>8}  {method:20} {exact:>7} {median(r.wall_ratio for r in group):>11.1f} "
            f"{fmean(r.prefill_ratio for r in group):>9.2f} {fmean(r.n_passes for r in group):>7.1f} "
            f"{fmean(r.seconds for r in group):>9.2f} {fmean(r.n_checked for r in group):>9.0f}"
        )
    return "\n".join(lines)


def bench_record(lm: LanguageModel, runs: Sequence[BenchRun]) -> dict[str, Any]:
    """Return the JSON record of a benchmark."""
    return {
        **record_head(lm),
        "vocab_size": lm.vocab_size,
        "runs": [asdict(run) for run in runs],
    }
