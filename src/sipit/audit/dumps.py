"""An audit of dumps that people already have: each is inverted, and what comes back is counted by place."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sipit.audit.attacks import attack
from sipit.audit.cells import Cell, Plan, Trial, cells_of
from sipit.audit.defences import Defended
from sipit.errors import SipitError
from sipit.models import LanguageModel
from sipit.models.plain_pass import plain_seconds
from sipit.observations import Observation, read_each, read_observation
from sipit.observations.formats import Dump, Wanted, is_foreign, observation_of, read_dumps, settled_dumps, unpadded
from sipit.observations.many import holds_many
from sipit.workers import Here, Workers

_Named = tuple[str, Observation | SipitError, tuple[int, ...] | None]
_Piece = tuple[Observation, tuple[int, ...] | None, str | None]  # rows, the ids beside them, the dtype of their pass


@dataclass(frozen=True, kw_only=True)
class DumpAudit:
    """What came of the dumps."""

    cells: list[Cell]
    trials: list[Trial]
    refused: list[tuple[str, SipitError]]  # entries that could not be read, and why


def audit_dumps(
    lm: LanguageModel,
    paths: Sequence[Path],
    wanted: Wanted,
    *,
    pass_dtype: str | None = None,
    workers: Workers | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> DumpAudit:
    """Invert every prompt in some files or folders, which are read as they are come to.

    Where token ids lie beside the states, what comes back is scored against them; else a prompt counts as given away
    when it is recovered, for the check proves it.

    Args:
        lm: the model.
        paths: observation files, or files and folders of other tools.
        wanted: what the user says of them.
        pass_dtype: of the pass that left the states, where it is not the model's (`invert`).
        workers: who inverts; None: this process.
        on_trial: told each trial as it is done.
    """
    plans: list[Plan] = []
    trials: list[Trial] = []
    refused: list[tuple[int, str, SipitError]] = []  # with the number of the entry: they are told in the files' order
    waiting: deque[tuple[int, str, Plan]] = deque()  # entries that are being inverted, in the order of their results

    def pieces() -> Iterator[_Piece]:
        entries = (entry for path in paths for entry in _entries(lm, path, wanted))
        for number, (name, seen, truth) in enumerate(entries):
            if isinstance(seen, SipitError):
                refused.append((number, name, seen))
            else:
                waiting.append((number, name, _plan(seen, pass_dtype)))
                yield seen, truth, pass_dtype

    for trial in (workers or Here(lm)).results(_tried, pieces()):
        number, name, plan = waiting.popleft()
        if isinstance(trial, SipitError):
            refused.append((number, name, trial))
            continue
        plans += [plan] if plan not in plans else []
        trials.append(replace(trial, prompt=len(trials)))
        if on_trial is not None:
            on_trial(trials[-1])
    told = [(name, error) for _, name, error in sorted(refused, key=lambda one: one[0])]
    return DumpAudit(cells=cells_of(plans, trials), trials=trials, refused=told)


def _entries(lm: LanguageModel, path: Path, wanted: Wanted) -> list[_Named]:
    try:
        if is_foreign(path):
            return [_of_dump(lm, path, each) for each in settled_dumps(list(read_dumps(path, wanted)), wanted)]
        if holds_many(path):
            return [(name, seen, None) for name, seen in read_each(path)]
        return [(path.name, read_observation(path), None)]
    except SipitError as error:
        return [(path.name, error, None)]


def _of_dump(lm: LanguageModel, path: Path, found: Dump | SipitError) -> _Named:
    if isinstance(found, SipitError):
        return path.name, found, None
    dump = unpadded(found)
    try:
        return dump.name, observation_of(dump, lm.shape), dump.input_ids
    except SipitError as error:
        return dump.name, error, None


def _plan(seen: Observation, pass_dtype: str | None) -> Plan:
    return Plan(layer=seen.layer, site=seen.site, dtype=seen.dtype, defence="none", strength=0.0, pass_dtype=pass_dtype)


def _tried(lm: LanguageModel, piece: _Piece) -> Trial | SipitError:
    seen, truth, pass_dtype = piece
    began = time.perf_counter()
    try:
        answer = attack(lm, Defended(seen=replace(seen, fingerprint=None)), seen.n_sought, pass_dtype=pass_dtype)
    except SipitError as error:
        return error
    seconds = time.perf_counter() - began
    known = truth if truth is not None and len(truth) == seen.n_sought else None
    n_right = sum(a == b for a, b in zip(answer.input_ids, known or answer.input_ids, strict=False))
    return Trial(
        cell=_plan(seen, pass_dtype).key,
        prompt=0,  # its number is known once those before it are done
        verdict=answer.verdict,
        tokens=seen.n_sought,
        exact_tokens=n_right if known is not None or answer.verdict == "recovered" else 0,
        seconds=seconds,
        wall_ratio=seconds / max(plain_seconds(lm, seen.cut, seen.n_positions), 1e-9),
        kl=None,
        agreement=None,
        shown=answer.shown(lm, known),
    )
