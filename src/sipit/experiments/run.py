"""Run experiments: every record with what made it, and on from where an earlier run stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sipit.corpora import corpus
from sipit.errors import ModelError, SipitError
from sipit.experiments.experiment import Experiment, Scale, Setting
from sipit.experiments.record import record_head
from sipit.models import LanguageModel
from sipit.storage import LineLog

OnRecord = Callable[[dict[str, Any]], None]
_CORPUS = {"smoke": "library", "small": "library", "paper": "wikipedia"}


def run_experiment(
    experiment: Experiment,
    lm: LanguageModel,
    *,
    scale: Scale,
    folder: Path,
    command: str,
    texts: str | None = None,
    seed: int = 0,
    on_record: OnRecord | None = None,
) -> list[dict[str, Any]]:
    """Run what is not in the log yet; return all records of the experiment at this scale, of this model.

    Args:
        experiment: which.
        lm: the model.
        scale: how much of it.
        folder: DIR/NAME.jsonl keeps a record a line, DIR/work what is too large for one.
        command: that made them, for the record.
        texts: a corpus by its name, or files; default: the standard library's, at scale "paper" Wikipedia.
        seed: of the random draws.
        on_record: told each new record.

    Raises:
        ModelError: the experiment needs a tokenizer, which the model lacks.
        StorageError: the log cannot be written.
    """
    if experiment.needs_tokenizer and lm.tokenizer is None:
        raise ModelError(f"experiment {experiment.name!r} cuts prompts from text, and {lm.name!r} has no tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "work" / f"{experiment.name}-{scale}-{lm.fingerprint.removeprefix('sha256:')[:12]}"
    setting = Setting(lm=lm, scale=scale, folder=work, texts=corpus(texts or _CORPUS[scale], seed=seed), seed=seed)
    log = LineLog(folder / f"{experiment.name}.jsonl")
    about = {"experiment": experiment.name, "scale": scale, "fingerprint": lm.fingerprint, "seed": seed}
    found = {r["key"]: r for r in log.records() if all(r.get(key) == value for key, value in about.items())}
    for task in experiment.tasks(setting):
        if task.key in found:
            continue
        began = time.perf_counter()
        try:
            values: dict[str, Any] = task.make()
        except SipitError as error:
            values = {"refused": str(error)}
        record = {
            **record_head(lm),
            **about,
            "key": task.key,
            "command": command,
            "seconds": time.perf_counter() - began,
            "values": values,
        }
        log.append(record)
        found[task.key] = record
        if on_record is not None:
            on_record(record)
    return list(found.values())
