"""Run an audit: each prompt in each cell, one line of a log each, so that a second run goes on where one stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipit.audit.attacks import attack
from sipit.audit.cells import Cell, Plan, Trial, cells_of
from sipit.audit.defences import Scene, defence_named
from sipit.audit.utility import utility_of
from sipit.errors import OptionError
from sipit.models import LanguageModel, in_pass
from sipit.models.plain_pass import plain_seconds
from sipit.observations import Site, dtype_named
from sipit.storage import LineLog
from sipit.workers import Here, Workers

OnTrial = Callable[[Trial], None]


def audit(
    lm: LanguageModel,
    prompts: Sequence[Tensor],
    *,
    cuts: Sequence[tuple[int | None, Site]],
    folder: Path,
    dtypes: Sequence[str] = ("float32",),
    defences: Sequence[str] = ("none",),
    pass_dtype: str | None = None,
    workers: Workers | None = None,
    on_trial: OnTrial | None = None,
) -> tuple[list[Cell], list[Trial]]:
    """Attack prompts' states in every cell, and return what came of it.

    Args:
        lm: the model.
        prompts: token ids, (T,) each.
        cuts: what leaks: blocks run, None for a site of one layer, and the site.
        folder: where the log lies, made if it is not there; it holds the prompts, so only its owner may read it.
        dtypes: that rows are stored in.
        defences: each "NAME:STRENGTH", or "none".
        pass_dtype: of the pass that leaves the states, where it is not the attacker's model's, as on a server.
        workers: who attacks; None: this process. The log and what is returned are the same but for the seconds.
        on_trial: told each trial as it is done.

    Raises:
        OptionError: there is no such layer, site, dtype or defence; or defences are asked of a pass in another dtype.
        StorageError: the log cannot be written.
    """
    named = {text: defence_named(text) for text in defences}
    require_undefended(pass_dtype, defences)
    plans = {
        Plan(
            layer=lm.checked_layer(layer, site),
            site=site,
            dtype=dtype,
            defence=one.name,
            strength=strength,
            pass_dtype=pass_dtype,
        ): text
        for layer, site in cuts
        for dtype in dtypes
        for text, (one, strength) in named.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    log = LineLog(folder / "trials.jsonl", is_private=True)
    trials = {(t["cell"], t["prompt_sha256"]): _trial(t) for t in log.records() if t["fingerprint"] == lm.fingerprint}
    digests = [hashlib.sha256(prompt.numpy().tobytes()).hexdigest() for prompt in prompts]
    waiting = {
        (plan.key, digest): (plan, text, number, prompt)
        for number, (prompt, digest) in enumerate(zip(prompts, digests, strict=True))
        for plan, text in plans.items()
        if (plan.key, digest) not in trials
    }
    found = (workers or Here(lm)).results(_tried, waiting.values())
    for (key, digest), trial in zip(waiting, found, strict=True):
        log.append({**trial.record(), "prompt_sha256": digest, "fingerprint": lm.fingerprint})
        trials[key, digest] = trial
        if on_trial is not None:
            on_trial(trial)
    wanted = set(digests)
    used = [trial for (_, digest), trial in trials.items() if digest in wanted]
    return cells_of(list(plans), used), used


def require_undefended(pass_dtype: str | None, defences: Sequence[str]) -> None:
    """Refuse defences of states that a pass in another dtype left.

    Raises:
        OptionError: there are some.
    """
    defended = [text for text in defences if text != "none"]
    if pass_dtype is not None and defended:
        raise OptionError(
            f"defence {defended[0]!r} is tried on states of a pass in the model's own dtype; leave it or the pass's "
            "dtype out"
        )


def _trial(record: dict[str, Any]) -> Trial:
    fields = {name: record[name] for name in Trial.__dataclass_fields__}
    return Trial(**{**fields, "shown": tuple(record["shown"])})


def _tried(lm: LanguageModel, piece: tuple[Plan, str, int, Tensor]) -> Trial:
    """Attack one prompt in one cell: the plan, the defence as it is named, the prompt's number and token ids."""
    plan, text, number, prompt = piece
    site: Any = plan.site
    source = lm if plan.pass_dtype is None else in_pass(lm, plan.pass_dtype)
    seen = source.capture(input_ids=prompt, layer=plan.layer, site=site)
    defence, strength = defence_named(text)
    generator = torch.Generator().manual_seed(1000 * number + plan.layer)
    stored = replace(seen, states=seen.states.to(dtype_named(plan.dtype)))
    defended = defence.apply(Scene(lm=lm, seen=stored, generator=generator), strength)
    if defended.noise is not None:
        sent = defended.seen.states.to(dtype_named(plan.dtype)).float()
        defended = replace(defended, seen=replace(defended.seen, states=sent))
    utility = utility_of(source, seen, defended.received or defended.seen)
    began = time.perf_counter()
    answer = attack(lm, defended, len(prompt), pass_dtype=plan.pass_dtype)
    seconds = time.perf_counter() - began
    truth = prompt.tolist()
    return Trial(
        cell=plan.key,
        prompt=number,
        verdict=answer.verdict,
        tokens=len(truth),
        exact_tokens=sum(a == b for a, b in zip(answer.input_ids, truth, strict=False)),
        seconds=seconds,
        wall_ratio=seconds / max(plain_seconds(lm, seen.cut, len(truth)), 1e-9),
        kl=None if utility is None else utility.kl,
        agreement=None if utility is None else utility.agreement,
        shown=answer.shown(lm, truth),
    )
