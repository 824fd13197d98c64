"""`sipit audit`: what states give away, cell by cell, as a record, a page, and an exit code for a gate."""

from __future__ import annotations

import shlex
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sipit.cli.commands import text_of
from sipit.cli.messages import refuse, say
from sipit.cli.workers import ray_option, workers_of
from sipit.errors import InputError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from sipit.audit import Cell, Trial
    from sipit.models import LanguageModel
    from sipit.observations import Cut
    from sipit.workers import Workers

_EXAMPLES_OF_A_CELL = 1
_DEFAULT_PROMPTS = 10
DEFENCES = (  # named here as well, so that --help needs no model library
    *("none", "gaussian", "dp-gaussian", "inverse-fisher", "rounding", "clipping", "dropping", "permute-rows"),
    *("permute-columns", "rotation", "mixing", "sharding"),
)


def add_audit(command: ArgumentParser, sites: tuple[str, ...], layer_text: Any) -> None:
    """Add the options of `sipit audit`."""
    command.add_argument("files", nargs="*", type=Path, metavar="FILE", help="dumps to audit in place of prompts")
    command.add_argument("--model", required=True, metavar="M", help="pinned model, folder, .gguf file or hub id")
    command.add_argument("--layer", type=layer_text, action="append", metavar="L", help="blocks run, or 'final'; again")
    command.add_argument("--site", choices=sites, action="append", metavar="S", help="what leaks (default: block)")
    command.add_argument(
        "--dtype", action="append", metavar="D", help="what rows are stored in (default: --pass-dtype, else float32)"
    )
    command.add_argument(
        "--defence",
        action="append",
        metavar="NAME:STRENGTH",
        help=f"what is done to them, beside nothing; repeatable: {', '.join(DEFENCES[1:])}",
    )
    command.add_argument(
        "--pass-dtype",
        metavar="D",
        help="what the pass that left the states computed in, where it is not the weights' dtype: a dtype, or "
        "autocast-bfloat16 or autocast-float16",
    )
    prompts = command.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", type=_count, metavar="N", help=f"prompts to try (default: {_DEFAULT_PROMPTS})")
    prompts.add_argument("--text", type=Path, metavar="F", help="UTF-8 file, each line a prompt")
    command.add_argument("--tokens", type=_count, default=20, metavar="T", help="of each of --prompts (default: 20)")
    command.add_argument(
        "--fail-above",
        type=float,
        default=0.0,
        metavar="R",
        help="exit 1 where a cell gives back more than this share of its prompts (default: 0, so one is enough)",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="audit.json, audit.html and the log")
    command.add_argument("--redact", action="store_true", help="leave every token out of the page")
    command.add_argument("--json", type=Path, metavar="F", help="write the record here too")
    ray_option(command)
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    command.add_argument("--weights-dtype", default="auto", help="dtype of the weights (default: auto, as stored)")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**6):
        raise ArgumentTypeError(f"takes a whole number from 1, got {text!r}")
    return int(text)


def audit(options: Namespace) -> int:
    """Run `sipit audit`."""
    from sipit.audit import given_away, require_undefended
    from sipit.audit.defences import defence_named
    from sipit.experiments.record import record_head
    from sipit.models import load, pass_named
    from sipit.observations import dtype_named
    from sipit.report.audit import audit_page, sentence
    from sipit.storage import require_writable, whole_file, write_json

    if not 0 <= options.fail_above <= 1:
        raise OptionError(f"--fail-above {options.fail_above} is no share; give one from 0 to 1")
    _refuse_mixed(options)
    for text in _defences(options):
        defence_named(text)
    for name in options.dtype or []:
        dtype_named(name)
    if options.pass_dtype is not None:
        pass_named(options.pass_dtype)
    require_undefended(options.pass_dtype, _defences(options))
    options.out.mkdir(parents=True, exist_ok=True)
    require_writable(options.out / "audit.json")
    lm = load(options.model, device=options.device, dtype=options.weights_dtype)
    began = time.perf_counter()
    with workers_of(
        options.ray, lm, model=options.model, device=options.device, dtype=options.weights_dtype
    ) as workers:
        cells, trials = (_of_dumps if options.files else _of_prompts)(lm, options, workers)
    record = {
        **record_head(lm),
        "command": shlex.join(["sipit", *sys.argv[1:]]),
        "seconds": time.perf_counter() - began,
        "fail_above": options.fail_above,
        "given_away": given_away(cells),
        "cells": [cell.record() for cell in cells],
    }
    examples = [trial.record() for cell in cells for trial in _examples_of(cell, trials)]
    with whole_file(options.out / "audit.html", is_private=not options.redact) as path:
        path.write_text(audit_page(record, examples, is_redacted=options.redact), encoding="utf-8")
    for path in (options.out / "audit.json", *([options.json] if options.json is not None else [])):
        write_json(path, record)
    _print(cells)
    say(f"{sentence(record)} Page: {options.out / 'audit.html'}")
    return 1 if record["given_away"] > options.fail_above else 0


def _refuse_mixed(options: Namespace) -> None:
    from sipit.observations import OF_ONE_LAYER

    if options.files:
        given = [name for name in ("site", "dtype", "defence", "prompts", "text") if getattr(options, name)]
        if given:
            raise OptionError(f"--{given[0]} is about prompts, and dumps were named; leave one of them out")
        return
    needy = [site for site in options.site or ["block"] if site not in OF_ONE_LAYER]
    numbers = [name for name in options.layer or [] if name != "final"]
    if not options.layer and needy:
        raise OptionError("say --layer, once or several times, or name dumps to audit")
    if options.site and needy and not numbers:
        raise OptionError(f"site {needy[0]!r} needs the number of its layer; add one with --layer")
    if numbers and not needy:
        raise OptionError(f"site {options.site[0]!r} lies behind all blocks; leave --layer {numbers[0]} out")
    if options.text is not None and not options.text.is_file():
        raise InputError(f"{options.text} is no file; name one with a prompt on each line")


def _of_prompts(lm: LanguageModel, options: Namespace, workers: Workers) -> tuple[list[Cell], list[Trial]]:
    from sipit.audit import audit as run
    from sipit.cli.display import CountDisplay
    from sipit.models import stored_dtype

    dtypes, defences, cuts = options.dtype or [stored_dtype(options.pass_dtype)], _defences(options), _cuts(lm, options)
    prompts = _prompts(lm, options)
    total = len(cuts) * len(dtypes) * len(defences) * len(prompts)
    with CountDisplay(total) as display:
        return run(
            lm,
            prompts,
            cuts=cuts,
            dtypes=dtypes,
            defences=defences,
            pass_dtype=options.pass_dtype,
            folder=options.out,
            workers=workers,
            on_trial=lambda trial: display.step(trial.tokens),
        )


def _defences(options: Namespace) -> list[str]:
    return ["none", *(text for text in options.defence or [] if text != "none")]


def _cuts(lm: LanguageModel, options: Namespace) -> list[Cut]:
    """Return each site at each layer; a site of one layer once, and `--layer final` as the site that it is."""
    from sipit.observations import OF_ONE_LAYER, Cut

    numbers = [int(name) for name in options.layer or [] if name != "final"]
    sites = options.site or (["block"] if numbers else [])
    cuts = {
        Cut(lm.checked_layer(layer, site), site): None
        for site in sites
        for layer in ([None] if site in OF_ONE_LAYER else numbers)
    }
    if "final" in (options.layer or []):
        cuts[lm.final_cut] = None
    return list(cuts)


def _prompts(lm: LanguageModel, options: Namespace) -> list[Tensor]:
    from sipit.corpora import library_prose
    from sipit.experiments.bench import prompts_from_text

    if options.text is not None:
        lines = [line for line in text_of(options.text).splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{options.text} holds no line of text; write a prompt on each")
        return [lm.encode(line) for line in lines]
    n = options.prompts or _DEFAULT_PROMPTS
    wanted, pieces, length = 8 * n * options.tokens, [], 0
    for piece in library_prose(seed=11):
        pieces.append(piece)
        length += len(piece)
        if length > wanted:
            break
    return prompts_from_text(lm, "\n\n".join(pieces), n_tokens=options.tokens, n_prompts=n)


def _of_dumps(lm: LanguageModel, options: Namespace, workers: Workers) -> tuple[list[Cell], list[Trial]]:
    """Invert dumps, each an own trial; what cannot be read is reported and passed over."""
    from sipit.audit.dumps import audit_dumps
    from sipit.cli.display import CountDisplay
    from sipit.observations.formats import Wanted

    layers = [name for name in options.layer or [] if name != "final"]
    wanted = Wanted(
        layer=int(layers[0]) if layers else None, site="final" if "final" in (options.layer or []) else None
    )
    if len(options.layer or []) > 1:
        raise OptionError("dumps of one place are audited at a time; give one --layer, or none where the files say it")
    with CountDisplay(len(options.files)) as display:
        found = audit_dumps(
            lm,
            options.files,
            wanted,
            pass_dtype=options.pass_dtype,
            workers=workers,
            on_trial=lambda trial: display.step(trial.tokens),
        )
    for name, error in found.refused:
        refuse(name, error)
    if not found.trials:
        raise found.refused[0][1] if found.refused else InputError("the files hold no states")
    return found.cells, found.trials


def _examples_of(cell: Cell, trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.cell == cell.plan.key][:_EXAMPLES_OF_A_CELL]


def _print(cells: list[Cell]) -> None:
    columns = ("layer", "site", "dtype", "defence", "prompts", "interval", "tokens", "s", "KL", "kept")
    rows = [
        [
            *(str(cell.layer), cell.site, cell.plan.stored),
            cell.defence + (f":{cell.strength:g}" if cell.strength else ""),
            f"{cell.exact_prompts}/{cell.prompts}",
            f"{100 * cell.low:.0f}-{100 * cell.high:.0f} %",
            f"{100 * cell.exact_tokens / cell.tokens:.0f} %",
            f"{cell.seconds:.2g}",
            "-" if cell.kl is None else f"{cell.kl:.2g}",
            "-" if cell.agreement is None else f"{100 * cell.agreement:.0f} %",
        ]
        for cell in cells
    ]
    widths = [max(len(row[i]) for row in [list(columns), *rows]) for i in range(len(columns))]
    for row in [list(columns), *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
