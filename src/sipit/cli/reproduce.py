"""`sipit reproduce` and `sipit report`: the paper's tables and figures by name, and the page of what held."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sipit.cli.messages import say
from sipit.errors import InputError, OptionError, SipitError

_SCALES = ("smoke", "small", "paper")
_DEFAULT_MODEL = "smollm2-135m"


def add_reproduce(command: ArgumentParser) -> None:
    """Add the options of `sipit reproduce`."""
    command.add_argument("name", nargs="?", metavar="NAME", help="an experiment, or all")
    command.add_argument("--list", action="store_true", help="name each with the table or figure it answers")
    command.add_argument("--scale", choices=_SCALES, default="small", help="smoke: seconds; small: minutes (default)")
    command.add_argument("--model", action="append", metavar="M", help=f"repeatable (default: {_DEFAULT_MODEL})")
    command.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    command.add_argument("--text", metavar="C", help="corpus or files to cut prompts from (default: standard library)")
    command.add_argument("--seed", type=int, default=0, help="of the random draws")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    command.add_argument("--dtype", default="auto", help="dtype of the weights (default: auto, as stored)")
    command.add_argument("--quantize", choices=("int8", "int8-vectorwise", "nf4", "fp4"), help="of linear weights")


def add_report(command: ArgumentParser) -> None:
    """Add the options of `sipit report`."""
    command.add_argument("folder", type=Path, metavar="DIR", help="that 'sipit reproduce' wrote to")
    command.add_argument("--out", type=Path, required=True, metavar="PAGE", help="self-contained HTML page")
    command.add_argument("--pdf", type=Path, metavar="FILE", help="print it too, by a Chromium that is installed")


def reproduce(options: Namespace) -> int:
    """Run `sipit reproduce`."""
    from sipit.cli.display import CountDisplay
    from sipit.experiments.catalogue import EXPERIMENTS, experiments_named
    from sipit.experiments.run import run_experiment
    from sipit.models import load

    if options.list:
        for one in EXPERIMENTS.values():
            print(f"{one.name:18} {one.answers}: {one.claim}")
        return 0
    if options.name is None:
        raise OptionError("name an experiment, or all; --list names them")
    chosen = experiments_named(options.name)
    if options.scale == "paper":
        for one in chosen:
            if one.paper_models:
                say(f"{one.name}: the paper ran {', '.join(one.paper_models)}; needs {one.paper_needs}")
    command = shlex.join(["sipit", *sys.argv[1:]])
    n_refused = 0
    for number, name in enumerate(options.model or [_DEFAULT_MODEL]):
        lm = load(name, device=options.device, dtype=options.dtype, quantize=options.quantize)
        for one in chosen:
            if number and not one.uses_model:
                continue
            try:
                with CountDisplay(0) as display:
                    tell = display.phase(f"{lm.name}: {one.name}, records")
                    made = [0]

                    def noted(_: dict[str, Any], made: list[int] = made, tell: Any = tell) -> None:
                        made[0] += 1
                        tell(made[0], made[0])

                    records = run_experiment(
                        one,
                        lm,
                        scale=options.scale,
                        folder=options.out,
                        command=command,
                        texts=options.text,
                        seed=options.seed,
                        on_record=noted,
                    )
            except SipitError as error:
                n_refused += 1
                say(f"sipit: {one.name}: {error}")
                continue
            refused = [record for record in records if "refused" in record["values"]]
            n_refused += len(refused)
            for record in refused:
                say(f"sipit: {one.name}, {record['key']}: {record['values']['refused']}")
            seconds = sum(record["seconds"] for record in records)
            print(f"{lm.name}  {one.name}: {len(records)} records, {seconds:.1f} s, {options.out / one.name}.jsonl")
    return 1 if n_refused else 0


def report(options: Namespace) -> int:
    """Run `sipit report`."""
    from sipit.experiments.catalogue import EXPERIMENTS
    from sipit.report.reproduction import reproduction_page
    from sipit.storage import LineLog, require_writable, whole_file

    if not options.folder.is_dir():
        raise InputError(f"{options.folder} is no folder; name one that 'sipit reproduce --out' wrote")
    files = [options.folder / f"{name}.jsonl" for name in EXPERIMENTS]
    records = [record for path in files if path.is_file() for record in LineLog(path).records()]
    if not records:
        raise InputError(f"{options.folder} holds no record of an experiment; run 'sipit reproduce all' first")
    wrong = [r for r in records if not isinstance(r.get("values"), dict) or r.get("experiment") not in EXPERIMENTS]
    if wrong:
        raise InputError(f"{options.folder} holds lines that are no records of 'sipit reproduce'; run it again")
    require_writable(options.out)
    text = reproduction_page(records, EXPERIMENTS)
    with whole_file(options.out) as path:
        path.write_text(text, encoding="utf-8")
    say(f"{options.out}: {len(records)} records, {len(text.encode()) / 2**20:.2f} MiB")
    if options.pdf is not None:
        _print_pdf(options.out, options.pdf)
    return 0


def _print_pdf(page: Path, out: Path) -> None:
    import shutil
    import subprocess
    import tempfile

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise OptionError("--pdf needs Chromium, which is not installed; print the page from a browser instead")
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--no-pdf-header-footer",
        ]
        command = [browser, *options, f"--print-to-pdf={out.absolute()}", page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode or not out.is_file():
        raise OptionError(f"Chromium did not print {page}; print the page from a browser instead")
