"""The commands under `sipit collisions`: their options, one public call each, and the result in print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sipit.cli.commands import cut_of, layer_text, loaded
from sipit.cli.messages import say
from sipit.cli.workers import ray_option, workers_of
from sipit.errors import MismatchError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from sipit.collisions import StateFolder
    from sipit.models import LanguageModel
    from sipit.observations import Cut

Adder = Callable[..., Any]

_GIB = 1 << 30


def add_collisions(add: Any, command: Adder, model_options: Adder) -> Any:
    """Add `collisions` and its own commands to the parser; return what takes more of them."""
    group = command(add, "collisions", None, "measure how far apart the states of different prompts lie")
    inner = group.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=type(group))

    survey = command(inner, "survey", run_survey, "the closest pairs among many prompts' last states, at every layer")
    survey.add_argument("--folder", type=Path, required=True, help="keeps the captured states; run again to go on")
    corpus_options(survey, n_prompts=2000, lengths="4,6,8,10,12")
    layer_option(survey, "default: every layer from 1 on, and final")
    survey.add_argument("--k", type=int, default=10, help="closest pairs to report (default: 10)")
    survey.add_argument("--full", action="store_true", help="distribution over all pairs, and the farthest pair")
    survey.add_argument("--shard", type=int, default=2048, metavar="N", help="prompts a file (default: 2048)")
    survey.add_argument("--figure", type=Path, metavar="FILE", help="draw distances by layer and by length")
    _search_options(survey)
    ray_option(survey)
    model_options(survey, default="smollm2-135m")

    continued = command(inner, "continuations", run_continuations, "every next token behind the closest prompts")
    continued.add_argument("--folder", type=Path, required=True, help="keeps the captured states; run again to go on")
    continued.add_argument("--survey", type=Path, metavar="FOLDER", help="take the closest prompts of this survey")
    continued.add_argument("--text", action="append", default=[], metavar="T", help="a prefix; repeatable")
    continued.add_argument("--prefixes", type=int, default=10, metavar="N", help="prompts of --survey (default: 10)")
    layer_option(continued, "default: the middle one and the last")
    _search_options(continued)
    model_options(continued, default="smollm2-135m")

    margins = command(inner, "margins", run_margins, "how far apart the next tokens of a prefix lie, at every layer")
    corpus_options(margins, n_prompts=100, lengths="4,8,12")
    margins.add_argument(
        "--tokens", type=int, default=256, metavar="N", help="next tokens tried, 0 for all (default: 256)"
    )
    margins.add_argument(
        "--pick", choices=("near", "random"), default="near", help="tokens of near embedding rows, or any (near)"
    )
    margins.add_argument(
        "--exhaustive", type=int, default=0, metavar="N", help="also the exact margin of the first N prefixes"
    )
    margins.add_argument("--log", type=Path, metavar="FILE", help="keeps what was found; run again to go on")
    layer_option(margins, "default: every layer from 1 on, and final")
    margins.add_argument("--json", type=Path, metavar="OUT", help="write the record")
    model_options(margins, default="smollm2-135m")
    return inner


def lengths_text(text: str) -> str:
    """Refuse what is no list of lengths, before a model is loaded."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"takes numbers of tokens separated by commas, got {text!r}")
    return text


def corpus_options(command: argparse.ArgumentParser, *, n_prompts: int, lengths: str) -> None:
    command.add_argument(
        "--corpus",
        default="library",
        metavar="C",
        help="library, library-prose, library-code, a file or folder, or from the hub: wikipedia, c4, "
        "pile-uncopyrighted, python-github-code (default: library)",
    )
    command.add_argument("--revision", help="commit of a hub data set (default: its newest)")
    command.add_argument("--prompts", type=int, default=n_prompts, metavar="N", help=f"(default: {n_prompts})")
    command.add_argument(
        "--lengths", type=lengths_text, default=lengths, metavar="L", help=f"tokens, by commas (default: {lengths})"
    )
    command.add_argument("--per-text", type=int, default=256, metavar="N", help="most prompts from one text")
    command.add_argument("--seed", type=int, default=0, help="of the random draws")


def layer_option(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--layer", action="append", type=layer_text, metavar="L", help=f"blocks run, or 'final'; repeatable; {default}"
    )


def _search_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threshold", type=float, default=1e-6, metavar="L2", help="a collision is this near (1e-6)")
    command.add_argument("--memory", type=float, default=2.0, metavar="GIB", help="of a search (default: 2)")
    command.add_argument("--json", type=Path, metavar="OUT", help="write the record")


def run_survey(options: argparse.Namespace) -> int:
    """Run `sipit collisions survey`."""
    from sipit.cli.display import CountDisplay
    from sipit.collisions import capture_states
    from sipit.experiments.cuts import every_cut
    from sipit.experiments.layer_surveys import logged_surveys
    from sipit.experiments.record import dated_head
    from sipit.report.collisions import draw_survey
    from sipit.report.plots import require_drawable
    from sipit.storage import LineLog, require_writable

    if options.json is not None:
        require_writable(options.json)
    if options.figure is not None:
        require_drawable(options.figure)
        require_writable(options.figure)
    if options.prompts < 2:
        raise OptionError(f"--prompts is {options.prompts}; a survey compares at least 2")
    if options.k < 1 or options.shard < 1:
        raise OptionError(f"--k and --shard must be at least 1, got {options.k} and {options.shard}")
    memory = _memory_of(options)
    lm = loaded(options.model, options)
    cuts = cuts_of(lm, options, default=every_cut(lm))
    prompts, source = prompts_of(lm, options)
    with (
        CountDisplay(0) as display,
        workers_of(
            options.ray, lm, model=options.model, device=options.device, dtype=options.dtype, quantize=options.quantize
        ) as workers,
    ):
        folder = capture_states(
            lm, prompts, cuts, options.folder, source=source, shard_prompts=options.shard, workers=workers,
            on_step=display.phase("prompts captured"),
        )  # fmt: skip
        log = LineLog(options.folder / "survey.jsonl")
        print(_SURVEY_HEAD)
        layers = {}
        for record in logged_surveys(
            lm, folder, cuts, log=log, k=options.k, threshold=options.threshold,
            memory=memory, is_full=options.full, workers=workers, on_step=display.phase("layers searched"),
        ):  # fmt: skip
            layers[record["layer"], record["site"]] = record
            print(_survey_line(record), flush=True)
    done = [layers[cut] for cut in cuts]
    record = {**dated_head(lm), "source": folder.manifest["source"], "n_prompts": len(folder), "layers": done}
    write(options.json, record)
    if options.figure is not None:
        draw_survey(record, options.figure)
    n_collisions = sum(int(layer["n_collisions"]) for layer in done)
    say(
        f"{sum(int(layer['n_pairs']) for layer in done):,} pairs in {len(done)} layers: {n_collisions} at distance "
        f"{options.threshold:g} or nearer"
    )
    return 0


def run_continuations(options: argparse.Namespace) -> int:
    """Run `sipit collisions continuations`."""
    from sipit.cli.display import CountDisplay
    from sipit.collisions import StateFolder, capture_continuations, closest_prompts, survey_continuations
    from sipit.experiments.record import dated_head
    from sipit.observations import Cut
    from sipit.storage import require_writable

    if (options.survey is None) == (not options.text):
        raise OptionError("continuations need prefixes: pass either --survey FOLDER or --text, which may be repeated")
    if options.json is not None:
        require_writable(options.json)
    memory = _memory_of(options)
    if options.survey is not None:
        StateFolder(options.survey)
    lm = loaded(options.model, options)
    cuts = cuts_of(lm, options, default=[Cut(max(lm.n_layers // 2, 1), "block"), Cut(lm.n_layers, "block")])
    if options.survey is None:
        prefixes = [lm.encode(text) for text in options.text]
    else:
        surveyed = surveyed_folder(lm, options.survey)
        prefixes = closest_prompts(surveyed, cuts[-1], n=options.prefixes, memory=memory)
    records = []
    with CountDisplay(0) as display:
        folder = capture_continuations(
            lm, prefixes, cuts, options.folder, on_step=display.phase("continuations captured")
        )
        for layer in survey_continuations(
            lm, folder, threshold=options.threshold, memory=memory, on_step=display.phase("searches done")
        ):
            records.append(asdict(layer))
            if layer.n_equal_rows and len(records) == 1:
                say(
                    f"{layer.n_equal_rows} pairs of next tokens have equal embedding rows, so equal states behind "
                    "every prefix; one token of each takes part below"
                )
            for kind, summary in (("within a prefix", layer.within), ("across prefixes", layer.across)):
                if summary.closest is not None:
                    near = summary.closest
                    print(
                        f"layer {layer_name(layer.layer, layer.site)}, {kind}: {summary.n_pairs:,} pairs, closest "
                        f"{near.distance:.6g} ({near.ordinary_distance:.6g} by ordinary passes, "
                        f"{near.relative_to_norm:.2g} of the norm), {summary.n_collisions} collisions: "
                        f"{shown(lm, near.first)} | {shown(lm, near.second)}",
                        flush=True,
                    )
    texts = [lm.decode(prefix) for prefix in prefixes]
    write(options.json, {**dated_head(lm), "prefixes": texts, "layers": records})
    return 0


def run_margins(options: argparse.Namespace) -> int:
    """Run `sipit collisions margins`."""
    from sipit.cli.display import CountDisplay
    from sipit.collisions import survey_margins
    from sipit.experiments.cuts import every_cut
    from sipit.experiments.record import dated_head
    from sipit.storage import require_writable

    if options.json is not None:
        require_writable(options.json)
    if options.log is not None:
        require_writable(options.log)
    lm = loaded(options.model, options)
    cuts = cuts_of(lm, options, default=every_cut(lm))
    prefixes, source = prompts_of(lm, options)
    with CountDisplay(0) as display:
        found = survey_margins(
            lm, prefixes, cuts, n_tokens=options.tokens or None, pick=options.pick, n_exhaustive=options.exhaustive,
            seed=options.seed, log=options.log, on_step=display.phase("next tokens run"),
        )  # fmt: skip
    print(
        f"{'layer':>8} {'least':>10} {'median':>10} {'mean':>10} {'least/norm':>11} {'median/norm':>11} "
        f"{'exact':>10} {'bound/exact':>11}  closest"
    )
    for layer in found:
        exact, ratio = "-", "-"
        if layer.exact:
            exact = f"{min(margin.distance for margin in layer.exact):.4g}"
            ratio = f"{max(margin.bound / margin.distance for margin in layer.exact if margin.distance):.4g}"
        print(
            f"{layer_name(layer.layer, layer.site):>8} {layer.least:10.4g} {dict(layer.percentiles)[50]:10.4g} "
            f"{layer.mean:10.4g} {layer.least_relative_to_norm:11.2g} {layer.median_relative_to_norm:11.2g} "
            f"{exact:>10} {ratio:>11}  {' | '.join(shown(lm, [token]) for token in layer.least_tokens)}"
        )
    write(options.json, {**dated_head(lm), "source": source, "layers": [asdict(layer) for layer in found]})
    return 0


_SURVEY_HEAD = (
    f"{'layer':>8} {'pairs':>14} {'closest':>10} {'float64':>9} {'varied':>10} {'/ norm':>8} {'/ median':>8} "
    f"{'float64':>9} {'median':>8} {'equal':>6} {'collide':>8} {'seconds':>8}"
)


def _survey_line(layer: dict[str, Any]) -> str:
    near = layer["closest"][0]
    rest = (layer["closest_varied"] or [{**near, "distance": float("nan"), "float64_distance": float("nan")}])[0]
    return (
        f"{layer_name(layer['layer'], layer['site']):>8} {layer['n_pairs']:>14,} {near['distance']:10.4g} "
        f"{near['float64_distance']:9.2g} {rest['distance']:10.4g} {short(rest['relative_to_norm'])} "
        f"{short(rest['relative_to_median'])} {rest['float64_distance']:9.4g} {layer['spread']['median']:8.4g} "
        f"{layer['n_equal']:>6} {layer['n_collisions']:>8} {layer['seconds']:8.1f}"
    )


def short(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2g'):>8}"


def layer_name(layer: int, site: str) -> str:
    return "final" if site == "final" else str(layer)


def shown(lm: LanguageModel, ids: Iterable[int]) -> str:
    ids = list(ids)
    text = lm.decode(ids)
    return str(ids) if text is None else repr(text)


def cuts_of(lm: LanguageModel, options: argparse.Namespace, *, default: list[Any]) -> list[Cut]:
    return default if not options.layer else [cut_of(lm, name) for name in dict.fromkeys(options.layer)]


def _memory_of(options: argparse.Namespace) -> int:
    """Return --memory in bytes; refuse it and --threshold before long work."""
    if not 0.01 <= options.memory < 1e6:
        raise OptionError(f"--memory is {options.memory} GiB; a search needs at least 0.01")
    if not 0 <= options.threshold < float("inf"):
        raise OptionError(f"--threshold is {options.threshold}; it is an L2 distance, 0 or more")
    return int(options.memory * _GIB)


def prompts_of(lm: LanguageModel, options: argparse.Namespace) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the prompts that the corpus options ask for, and where they come from."""
    from sipit.cli.display import waiting
    from sipit.corpora import corpus, exact_prompts, special_start

    lengths = [int(part) for part in options.lengths.split(",")]
    texts = corpus(options.corpus, seed=options.seed, revision=options.revision)
    with waiting("reading prompts"):
        prompts = exact_prompts(
            lm.encode,
            texts.texts,
            n_prompts=options.prompts,
            lengths=lengths,
            seed=options.seed,
            start=special_start(lm.encode),
            per_text=options.per_text,
        )
    return prompts, {**texts.describe(), "lengths": lengths, "per_text": options.per_text}


def surveyed_folder(lm: LanguageModel, path: Path) -> StateFolder:
    """Open the folder of a survey of this model.

    Raises:
        MismatchError: it holds another model's states.
    """
    from sipit.collisions import StateFolder

    folder = StateFolder(path)
    if folder.manifest["fingerprint"] != lm.fingerprint:
        raise MismatchError(
            f"{path} holds states of the model {folder.manifest['model']!r}, not of {lm.name!r}; name the model it was "
            "made with"
        )
    return folder


def write(path: Path | None, record: dict[str, Any]) -> None:
    from sipit.storage import write_json

    if path is not None:
        write_json(path, record)
