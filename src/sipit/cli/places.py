"""`sipit identify` and `sipit verify`: where the rows of a dump come from, and whether they are what its label says."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sipit.cli.commands import ids_of, loaded, text_of, wanted_of
from sipit.cli.messages import printable, refuse, say
from sipit.errors import InputError, OptionError, SipitError

if TYPE_CHECKING:
    from torch import Tensor

    from sipit.inversion.places import Identification, Verification
    from sipit.models import LanguageModel
    from sipit.observations import Observation
    from sipit.observations.formats import Dump, Wanted

    _RowsOf = Callable[[LanguageModel], Tensor]  # (T, W), as the model lays out what they hold
    # The name of an entry, what it is said to be, and the ids or the text that it is said to be of.
    _Labelled = tuple[str, Dump | Observation | SipitError, tuple[int, ...] | str | None]

_NAMED = 8  # bad rows shown of one dump
_NEAR = 4  # near misses shown of one dump
_AT_ONCE = 64  # dumps held at a time, among whose prompts bad rows are looked for


def identify(options: Namespace) -> int:
    """Run `sipit identify`."""
    from sipit.cli.display import waiting
    from sipit.storage import require_writable, write_json

    if options.json is not None:
        require_writable(options.json)
    entries = list(_rows_in(options.file, wanted_of(options)))
    chosen = entries if options.all else entries[:1]
    if isinstance(chosen[0][1], SipitError) and len(chosen) == 1:
        raise chosen[0][1]
    models = [loaded(name, options) for name in options.model]
    fits: list[dict[str, Any]] = []
    near: list[str] = []
    for name, entry in chosen:
        if isinstance(entry, SipitError):
            refuse(name, entry)
            continue
        rows_of, ids = entry
        with waiting(f"{name}: looking at every layer and site"):
            found = _identified(models, options, rows_of, ids)
        fits += [{"entry": name, **asdict(fit)} for fit in found.fits]
        near += found.near
        if not found.fits:
            print(f"{printable(name)}: none of these ({', '.join(lm.name for lm in models)}) at any layer or site")
            for sentence in found.near[:_NEAR]:
                say(f"near      {sentence}")
    if len(entries) > len(chosen):
        say(f"{options.file} holds {len(entries)} entries, and this is the first; --all looks at each, --prompt at one")
    if fits:
        _print_fits(fits)
    if options.json is not None:
        write_json(options.json, {"file": str(options.file), "fits": fits, "near": near})
    return 0 if fits else 1


def _identified(
    models: list[LanguageModel], options: Namespace, rows_of: _RowsOf, ids: tuple[int, ...] | None
) -> Identification:
    """Identify rows among some models; in the dtype that the rows were rounded to where nothing fits otherwise."""
    from sipit.inversion.places import Identification
    from sipit.inversion.places import identify as run
    from sipit.observations.rounding import narrowed

    found = [run(lm, rows_of(lm), input_ids=ids) for lm in models]
    stored = narrowed(rows_of(models[0])).dtype
    if not any(one.fits for one in found) and options.dtype == "auto":
        for number, (name, lm) in enumerate(zip(options.model, models, strict=True)):
            if stored.itemsize < lm.dtype.itemsize and found[number].near:
                narrow = Namespace(**{**vars(options), "dtype": str(stored).removeprefix("torch.")})
                found.append(run(loaded(name, narrow), rows_of(lm), input_ids=ids, is_thorough=False))
    return Identification(
        fits=tuple(fit for one in found for fit in one.fits), near=tuple(line for one in found for line in one.near)
    )


def _print_fits(fits: list[dict[str, Any]]) -> None:
    """Print a table, a line a fit, best first."""
    columns = ("model", "layer", "site", "scale", "offset", "dtype", "distance", "tolerance")
    rows = [
        [f"{fit[key]:.4g}" if isinstance(fit[key], float) else str(fit[key]) for key in columns]
        + [
            printable(fit["entry"])
            + ("" if fit["columns"] is None else f", columns {fit['columns'][0]} to {fit['columns'][1]}")
        ]
        for fit in fits
    ]
    titles = [*columns, "rows of"]
    widths = [max(len(row[n]) for row in [titles, *rows]) for n in range(len(titles))]
    for row in [titles, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rows_in(path: Path, wanted: Wanted) -> Iterator[tuple[str, tuple[_RowsOf, tuple[int, ...] | None] | SipitError]]:
    """Yield the name, rows and ids of each entry of a file or folder, of ours or of another tool."""
    from sipit.observations import read_each, read_observation
    from sipit.observations.formats import is_foreign, read_dumps
    from sipit.observations.many import holds_many

    if is_foreign(path):
        for number, dump in enumerate(read_dumps(path, wanted)):
            if isinstance(dump, SipitError):
                yield f"{path}: entry {number}", dump
            elif dump.columns is not None:
                yield (
                    dump.name,
                    InputError(f"{dump.name} holds {dump.site} of some tokens only; 'sipit invert' reads it"),
                )
            else:
                yield dump.name, (partial(_rows_for, dump), dump.input_ids)
        return
    found = read_each(path) if holds_many(path) else [(path.name, read_observation(path))]
    for name, seen in found:
        yield name, seen if isinstance(seen, SipitError) else (partial(_same_rows, seen.states), None)


def _rows_for(dump: Dump, lm: LanguageModel) -> Tensor:
    from sipit.observations.formats import in_halves

    return in_halves(dump, lm.shape).values


def _same_rows(rows: Tensor, _: LanguageModel) -> Tensor:
    return rows


def verify(options: Namespace) -> int:
    """Run `sipit verify`."""
    from sipit.storage import LineLog, require_writable, write_json

    entries = _labelled(options)
    first = next(entries)
    second = next(entries, None)
    is_one = second is None
    if is_one and isinstance(first[1], SipitError):
        raise first[1]
    if options.json is not None and is_one:
        require_writable(options.json)
    model = options.model or getattr(first[1], "model", None)
    if model is None:
        raise OptionError(f"{options.file} does not say which model it came from; name one with --model")
    log = LineLog(options.json) if options.json is not None and not is_one else None
    done = set() if log is None else {record.get("file") for record in log.records()}
    n_held = n_bad = n_refused = 0
    waiting = (
        entry for entry in chain([first] if second is None else [first, second], entries) if entry[0] not in done
    )
    for name, outcome in _verified(loaded(model, options), waiting):
        if isinstance(outcome, SipitError):
            if is_one:
                raise outcome
            refuse(name, outcome)
            n_refused += 1
            continue
        n_held += outcome.holds
        n_bad += not outcome.holds
        record = {"file": name, **outcome.record()}
        if is_one:
            _print_verification(outcome)
            if options.json is not None:
                write_json(options.json, record)
            continue
        print(json.dumps({key: record[key] for key in ("file", "holds", "rows")} | {"bad_rows": len(outcome.bad_rows)}))
        if log is not None:
            log.append(record)
    if not is_one:
        said = f", refused {n_refused}" if n_refused else ""
        said += f"; {len(done)} are in {options.json} already" if done else ""
        say(f"{n_held} of {n_held + n_bad + n_refused} hold{said}")
    return 0 if not n_bad and not n_refused else 1


def _print_verification(found: Verification) -> None:
    place = f"layer {found.layer}, site {found.site} of {found.model}"
    place += f", from position {found.first_position}," if found.first_position else ""
    if found.holds:
        print(f"holds: all {found.rows} rows are {place} for the ids beside them")
        return
    print(f"does not hold: {len(found.bad_rows)} of {found.rows} rows are not {place} for the ids beside them")
    for bad in found.bad_rows[:_NAMED]:
        what = bad.instead or "nothing that was found in this model's states of these prompts"
        print(f"  row {bad.row}: {bad.distance:.3g} away, tolerance {bad.tolerance:.2g}; it is {what}")
    if len(found.bad_rows) > _NAMED:
        print(f"  and {len(found.bad_rows) - _NAMED} more; --json lists each")


def _verified(lm: LanguageModel, entries: Iterator[_Labelled]) -> Iterator[tuple[str, Verification | SipitError]]:
    """Verify dumps side by side, one core each, some at a time; yield them in their order."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from sipit.inversion.places import verify as run
    from sipit.observations.formats import Dump, observation_of

    def one(entry: _Labelled, others: list[tuple[int, ...]]) -> tuple[str, Verification | SipitError]:
        name, labelled, said = entry
        if isinstance(labelled, SipitError):
            return name, labelled
        try:
            seen = observation_of(labelled, lm.shape) if isinstance(labelled, Dump) else labelled
            ids = [int(i) for i in lm.encode(said)] if isinstance(said, str) else said
            return name, run(lm, seen, ids or (), others=others)
        except SipitError as error:
            return name, error

    before = torch.get_num_threads()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        while some := list(islice(entries, _AT_ONCE)):
            others = list(dict.fromkeys(said for _, _, said in some if isinstance(said, tuple)))
            torch.set_num_threads(before if len(some) == 1 else 1)
            try:
                yield from pool.map(one, some, repeat(others))
            finally:
                torch.set_num_threads(before)


def _labelled(options: Namespace) -> Iterator[_Labelled]:
    """Yield the name of each entry, what it is said to be, and its ids or text; or why it has none."""
    from sipit.observations import read_each, read_observation
    from sipit.observations.formats import Dump, is_foreign, read_dumps, settled_dumps
    from sipit.observations.many import holds_many

    said: tuple[int, ...] | str | None = tuple(ids_of(options.ids)) if options.ids is not None else options.text
    if options.text_file is not None:
        said = text_of(options.text_file)
    if is_foreign(options.file):
        wanted = wanted_of(options)
        for number, item in enumerate(read_dumps(options.file, wanted)):
            dump = settled_dumps([item], wanted)[0]
            if isinstance(dump, Dump):
                yield _with_ids(dump.name, dump, said if said is not None else dump.input_ids)
            else:
                yield item.name if isinstance(item, Dump) else f"{options.file}: entry {number}", dump, None
        return
    found = (
        read_each(options.file) if holds_many(options.file) else [(options.file.name, read_observation(options.file))]
    )
    for name, seen in found:
        yield (name, seen, None) if isinstance(seen, SipitError) else _with_ids(name, seen, said)


def _with_ids(name: str, labelled: Dump | Observation, said: tuple[int, ...] | str | None) -> _Labelled:
    if said is not None:
        return name, labelled, said
    return name, InputError(f"{name} holds no token ids to verify it by; say them: --ids, --text or --text-file"), None


def add_places(add: Any, command: Any, dump_options: Any, model_options: Any) -> None:
    """Add the two commands to the command line."""
    identify_: ArgumentParser = command(
        add,
        "identify",
        identify,
        "find out which model, layer, site and scale the rows of a dump fit",
        "Looks at every layer and site, by the first rows of the prompt and by the ids beside them, if any. What fits "
        "was checked; exit code 1 where nothing does.",
    )
    identify_.add_argument("file", type=Path, help="observation file, or another tool's file")
    identify_.add_argument("--all", action="store_true", help="every entry of the file, not the first alone")
    dump_options(identify_)
    identify_.add_argument("--json", type=Path, metavar="OUT", help="write what fits and what nearly does")
    model_options(identify_, default="smollm2-135m", is_repeatable=True)

    verify_: ArgumentParser = command(
        add,
        "verify",
        verify,
        "check that the rows of a dump are the states of the token ids beside them, row by row",
        "One ordinary pass a prompt. For rows that are not, says what they are instead: another layer, position, "
        "prompt or scale. Exit code 0 if all hold, 1 if not.",
    )
    verify_.add_argument("file", type=Path, help="another tool's file or a folder of them, or an observation file")
    ids = verify_.add_mutually_exclusive_group()
    ids.add_argument("--ids", metavar="IDS", help="token ids of the rows, if none lie beside them")
    ids.add_argument("--text", help="their text")
    ids.add_argument("--text-file", type=Path, metavar="F", help="UTF-8 file of their text")
    dump_options(verify_)
    verify_.add_argument("--json", type=Path, metavar="OUT", help="write the outcome, with every bad row")
    model_options(verify_, default=None)
