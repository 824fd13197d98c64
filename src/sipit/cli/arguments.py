"""The grammar of the command line. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import sipit.cli.audit as audit
import sipit.cli.collision_cases as collision_cases
import sipit.cli.collisions as collisions
import sipit.cli.commands as commands
import sipit.cli.places as places
import sipit.cli.reproduce as reproduce
from sipit import __version__
from sipit.cli.commands import layer_text, noise_of
from sipit.cli.workers import ray_option
from sipit.errors import OptionError

_MODEL = "pinned model (smollm2-135m, gemma-3-270m), folder, .gguf file or hub id"
_POLICIES = ("auto", "likely", "gradient", "random", "vocabulary")
_SITES = (
    *("block", "final", "kv", "keys", "values", "logits", "log_probs"),
    *("block_unit", "block_centred", "final_unit"),
)
_METHODS = ("auto", "auto-no-fit", "vocabulary-matching", "reference-sipit", "random")
_QUANTIZERS = ("int8", "int8-vectorwise", "nf4", "fp4")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class _Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and names the nearest neighbour of what it does not know."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": takes ", " takes ", 1)
        raise OptionError(f'{message}; see "{self.prog} --help"')

    # Overloaded in typeshed, which an override with one signature cannot repeat.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Refuse the first unknown option or command here, before a missing one hides it."""
        args = sys.argv[1:] if args is None else list(args)
        commands = self._commands()
        for word in args:
            name = word.partition("=")[0]
            if word == "--":
                break
            if word.startswith("--") and " " not in word:
                if name not in self._option_string_actions:
                    self.error(f"there is no option {name!r}{_nearest(name, self._option_string_actions)}")
            elif commands and not word.startswith("-"):
                if word not in commands:
                    known = _nearest(word, commands) or f"; the commands are {', '.join(commands)}"
                    self.error(f"there is no command {word!r}{known}")
                break  # what follows belongs to the command
        return super().parse_known_args(args, namespace)

    def _commands(self) -> list[str]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return list(action.choices)
        return []


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f", the nearest is {found[0]!r}" if found else ""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = _Parser(
        prog="sipit",
        description="Recover the exact prompt from a causal language model's hidden states, with evidence.",
        epilog="Exit codes: 0 recovered / holds, 1 not recovered / does not hold, 2 bad usage or input.",
    )
    top.add_argument("--version", action="version", version=f"sipit {__version__}")
    add = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    demo = _command(add, "demo", commands.demo, "capture a paragraph's states, forget it, recover it")
    demo.add_argument("--layer", type=layer_text, metavar="L", help="blocks run, or 'final' (default: the middle one)")
    demo.add_argument(
        "--web", action="store_true", help="a page in the browser, for your own text or file (extra 'web')"
    )
    demo.add_argument("--port", type=int, metavar="N", help="of --web (default: the first free one from 7860)")
    _model_options(demo, default="smollm2-135m")

    capture = _command(add, "capture", commands.capture, "write the states of one prompt to a file")
    prompt = capture.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--text", help="the prompt")
    prompt.add_argument("--text-file", type=Path, metavar="F", help="UTF-8 file holding the prompt, byte for byte")
    prompt.add_argument("--lines-file", type=Path, metavar="F", help="UTF-8 file, each line a prompt of its own")
    prompt.add_argument("--ids", metavar="IDS", help="token ids, separated by commas")
    capture.add_argument("--chat", action="store_true", help="wrap the text in the model's chat template")
    capture.add_argument("--layer", type=layer_text, metavar="L", help="blocks run, 0 to n_layers, or 'final'")
    capture.add_argument(
        "--site",
        choices=_SITES,
        default="block",
        metavar="S",
        help=f"what to write: {', '.join(_SITES)} (default: block, the residual stream; see docs/sites.md)",
    )
    capture.add_argument(
        "--store-dtype",
        choices=_DTYPES,
        help="store the states in this dtype (default: the model's)",
    )
    capture.add_argument(
        "--last", action="store_true", help="write the last token's state alone, and nothing of how many came before"
    )
    capture.add_argument("--out", type=Path, required=True, metavar="FILE", help="observation file to write")
    _model_options(capture, default="smollm2-135m")

    invert = _command(
        add,
        "invert",
        commands.invert,
        "recover the prompt from an observation file, or from a file that another tool wrote",
        "Verdicts: recovered (every token within tolerance, no other checked token is), probable (under an estimated "
        "noise model the prompt's posterior is 0.95 or more, no proof), ambiguous (two tokens "
        "fit, or one only within --noise), unmatched (the whole vocabulary was tried at a position: usually "
        "another model, layer, site or dtype than the states came from).",
    )
    invert.add_argument(
        "file", type=Path, help="observation file, a file of many, a folder of them, or another tool's file"
    )
    _dump_options(invert)
    _prefix_options(invert)
    _last_options(invert)
    ray_option(invert)
    invert.add_argument("--policy", choices=_POLICIES, default="auto", help="order of candidates (default: auto)")
    invert.add_argument(
        "--noise",
        type=noise_of,
        default=0.0,
        metavar="auto|L2",
        help="noise added to each state: the most it is, as an L2 distance, or auto to estimate it and seek the most "
        "probable prompt (docs/noise.md)",
    )
    invert.add_argument("--exhaustive", action="store_true", help="check the whole vocabulary at every position")
    invert.add_argument("--max-batch", type=int, default=256, metavar="N", help="most candidates in one pass")
    invert.add_argument("--seed", type=int, default=0, help="of the random draws")
    invert.add_argument(
        "--pass-dtype",
        metavar="D",
        help="what the pass that left the rows computed in, where it is not --dtype: a dtype, or autocast-bfloat16 or "
        "autocast-float16 where it ran under torch.autocast; the rows are sought in --dtype and judged by such a pass",
    )
    invert.add_argument("--any-model", action="store_true", help="ignore the model fingerprint in the file")
    invert.add_argument("--no-fit", action="store_true", help="neither use nor make a fitted inverse")
    invert.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write the record, which is a certificate; of many observations one a line, going on where it stopped; "
        "it holds the prompt in clear, so only its owner may read it (mode 0600)",
    )
    invert.add_argument(
        "--redact",
        action="store_true",
        help="leave text, token ids and tokens out of the record; nothing can be replayed from it",
    )
    invert.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep the recovered prefix in FILE, and start from what it holds"
    )
    _model_options(invert, default=None)

    check = _command(
        add,
        "check",
        commands.check,
        "replay a certificate by one ordinary forward pass, trusting nothing of the search",
    )
    check.add_argument("certificate", type=Path, help="file written by sipit invert --json")
    check.add_argument("file", type=Path, help="observation file, or the other tool's file that was inverted")
    _dump_options(check)
    check.add_argument("--json", type=Path, metavar="OUT", help="write the outcome")
    _model_options(check, default=None)
    check.set_defaults(dtype=None)

    fit = _command(
        add,
        "fit",
        commands.fit,
        "fit an inverse ahead of time, which makes every later inversion at that layer fast",
        "Takes minutes, once per model, layer and site; goes on where it was interrupted. The inverse only orders "
        "candidates: a bad one costs time, never correctness.",
    )
    fit.add_argument(
        "--layer",
        action="append",
        type=layer_text,
        required=True,
        metavar="L",
        help="blocks run, or 'final'; repeatable",
    )
    fit.add_argument(
        "--last",
        action="store_true",
        help="train the prompt network instead, which reads a prompt off its last token's state; half an hour or more",
    )
    fit.add_argument("--again", action="store_true", help="fit anew what has a fit already, instead of reporting it")
    fit.add_argument("--text", action="append", type=Path, default=[], metavar="F", help="more text to fit on")
    fit.add_argument("--json", type=Path, metavar="OUT", help="write the report: held-out ranks by kind of text, cost")
    _model_options(fit, default="smollm2-135m")

    bench = _command(add, "bench", commands.bench, "run methods of inversion side by side on the same observations")
    bench.add_argument(
        "--layer",
        action="append",
        type=layer_text,
        required=True,
        metavar="L",
        help="blocks run, or 'final'; repeatable",
    )
    bench.add_argument("--text-file", type=Path, metavar="F", help="UTF-8 text to cut prompts from")
    bench.add_argument("--random-ids", action="store_true", help="prompts of uniformly random ids instead")
    bench.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens a prompt (default: 64)")
    bench.add_argument("--prompts", type=int, default=20, metavar="N", help="number of prompts (default: 20)")
    bench.add_argument("--method", action="append", metavar="A", help=f"{', '.join(_METHODS)}; repeatable")
    bench.add_argument("--max-seconds", type=float, default=float("inf"), help="most seconds for one prompt")
    bench.add_argument("--seed", type=int, default=0, help="of the random draws")
    bench.add_argument("--json", type=Path, metavar="OUT", help="write the record")
    bench.add_argument("--figure", type=Path, metavar="FILE", help="draw what each method costs (extra 'report')")
    _model_options(bench, default="smollm2-135m")
    places.add_places(add, _command, _dump_options, _model_options)
    tables = _command(
        add,
        "reproduce",
        reproduce.reproduce,
        "the paper's tables, figures and theorems on a model of one's own, a record each",
        "Goes on where it was interrupted: a record that DIR holds is not made again.",
    )
    reproduce.add_reproduce(tables)
    claims = _command(
        add, "report", reproduce.report, "one page of what 'sipit reproduce' found: each claim, and whether it held"
    )
    reproduce.add_report(claims)

    audited = _command(
        add,
        "audit",
        audit.audit,
        "how much of their prompts states give away, by place and defence, and what each defence costs",
        "Exit 1 where a cell gives back more than --fail-above of its prompts, 0 where none does. Goes on where it was "
        "interrupted. The log in DIR holds the prompts, so only its owner can read it.",
    )
    audit.add_audit(audited, _SITES, layer_text)

    inner = collisions.add_collisions(add, _command, _model_options)
    collision_cases.add_cases(inner, _command, _model_options)
    return top


def _command(
    add: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    summary: str,
    epilog: str | None = None,
) -> _Parser:
    made: _Parser = add.add_parser(name, help=summary, description=summary.capitalize() + ".", epilog=epilog)
    made.set_defaults(run=run)
    return made


def _dump_options(command: argparse.ArgumentParser) -> None:
    """Add what a user says of another tool's file where the file itself does not."""
    group = command.add_argument_group("another tool's file (see docs/other-tools.md)")
    group.add_argument("--layer", type=layer_text, metavar="L", help="blocks run before these states, or 'final'")
    group.add_argument(
        "--site", choices=_SITES, metavar="S", help=f"what they are, if the file does not say: {', '.join(_SITES)}"
    )
    group.add_argument("--layers", metavar="A,B,C", help="layers of the columns joined in the file, in their order")
    group.add_argument("--key", metavar="K", help="name of the tensor in a file of several")
    group.add_argument("--prompt", type=int, metavar="N", help="number of the prompt in a batch, from 0")
    group.add_argument("--states-dtype", metavar="D", help="dtype of raw values whose file lost it, such as bfloat16")


def _prefix_options(command: argparse.ArgumentParser) -> None:
    """Add what a user knows of the tokens before the first row."""
    group = command.add_argument_group("where the rows belong")
    group.add_argument(
        "--positions",
        metavar="P",
        help="position of each row where some have none: 0,2,5 or a range as 1:64:2; the last is that of the last row",
    )
    group.add_argument("--shuffled", action="store_true", help="the rows are out of order; they are put in order first")
    group.add_argument(
        "--permuted", action="store_true", help="the columns are, behind one permutation that all rows share"
    )
    known = group.add_mutually_exclusive_group()
    known.add_argument(
        "--prefix-text", metavar="T", help="text before the first row, as the model's tokenizer reads it"
    )
    known.add_argument("--prefix-ids", metavar="IDS", help="token ids before the first row, separated by commas")
    known.add_argument(
        "--prefix-template",
        nargs="?",
        const="",
        metavar="SYSTEM",
        help="what the model's chat template writes before a user's message, behind this system prompt if one is given",
    )


def _last_options(command: argparse.ArgumentParser) -> None:
    """Add what is said of a prompt of which the last row alone is held."""
    group = command.add_argument_group("one vector: the last token's state alone (see docs/last-token.md)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest prompt that is sought (default: 8)")
    group.add_argument("--length", type=int, metavar="T", help="tokens of the prompt, where that is known")
    group.add_argument("--seconds", type=float, metavar="S", help="budget of the search (default: 60)")


def _model_options(command: argparse.ArgumentParser, *, default: str | None, is_repeatable: bool = False) -> None:
    known = "the one the file names" if default is None else default
    if is_repeatable:
        command.add_argument("--model", action="append", required=True, metavar="M", help=f"{_MODEL}; repeatable")
    else:
        command.add_argument("--model", default=default, metavar="M", help=f"{_MODEL} (default: {known})")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    stored = "the one the certificate names" if command.prog.endswith(" check") else "auto, as stored"
    command.add_argument("--dtype", default="auto", help=f"dtype of the weights (default: {stored})")
    command.add_argument(
        "--quantize", choices=_QUANTIZERS, help="hold the linear weights so, by bitsandbytes (extra 'quantized')"
    )
