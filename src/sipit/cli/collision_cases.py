"""The commands under `sipit collisions` about prompts made to collide: families, constructed, precision."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sipit.cli.collisions import (
    corpus_options,
    cuts_of,
    layer_name,
    layer_option,
    prompts_of,
    short,
    shown,
    surveyed_folder,
    write,
)
from sipit.cli.commands import loaded
from sipit.cli.messages import say
from sipit.errors import OptionError

if TYPE_CHECKING:
    from sipit.collisions import Climb
    from sipit.models import LanguageModel

Adder = Callable[..., Any]

_ORDERED = 5  # most similar samples of a survey that are put in every order: 120 prompts


def add_cases(inner: Any, command: Adder, model_options: Adder) -> None:
    """Add the commands to those of `sipit collisions`."""
    families = command(inner, "families", run_families, "prompts that differ by little, and searched near-collisions")
    families.add_argument("--text", action="append", default=[], metavar="T", help="a text to vary; repeatable")
    families.add_argument("--survey", type=Path, metavar="FOLDER", help="vary the closest prompts of this survey")
    families.add_argument(
        "--texts", type=int, default=2, metavar="N", help="of --survey, or else of the standard library (default: 2)"
    )
    families.add_argument("--longest", type=int, default=64, metavar="N", help="longest run of one token (default: 64)")
    families.add_argument("--climb", type=int, default=0, metavar="ROUNDS", help="hill-climb from each closest pair")
    families.add_argument(
        "--pairs", type=int, default=3, metavar="N", help="closest pairs of --survey to climb from at a layer (3)"
    )
    layer_option(families, "default: 1, the middle one, the last and final")
    _common_options(families)
    model_options(families, default="smollm2-135m")

    constructed = command(
        inner, "constructed", run_constructed, "models made to collide, or not: what the search finds"
    )
    constructed.add_argument("--tiny", action="store_true", help="use tiny random models only, no --model")
    _common_options(constructed)
    model_options(constructed, default="smollm2-135m")

    precision = command(inner, "precision", run_precision, "the closest pair under weights of lower precision")
    corpus_options(precision, n_prompts=300, lengths="4,8,12")
    precision.add_argument("--families", action="store_true", help="prompts that differ by little instead of a corpus")
    precision.add_argument(
        "--precision",
        action="append",
        metavar="P",
        help="float32, bfloat16, float16, int8, int4 (simulated), bnb-int8, bnb-int8-vectorwise, bnb-nf4, bnb-fp4 "
        "(bitsandbytes); repeatable (default: float32, bfloat16, int8, int4)",
    )
    layer_option(precision, "default: 1, the middle one, the last and final")
    _common_options(precision, has_seed=True)
    model_options(precision, default="smollm2-135m")


def _common_options(command: argparse.ArgumentParser, *, has_seed: bool = False) -> None:
    if not has_seed:
        command.add_argument("--seed", type=int, default=0, help="of the random draws")
    command.add_argument("--threshold", type=float, default=1e-6, metavar="L2", help="a collision is this near (1e-6)")
    command.add_argument("--json", type=Path, metavar="OUT", help="write the record")


def run_families(options: argparse.Namespace) -> int:
    """Run `sipit collisions families`."""
    from sipit.cli.display import CountDisplay
    from sipit.collisions import StateFolder, family_prompts, sample_texts, similar_texts, survey_families
    from sipit.collisions.families import run_lengths
    from sipit.experiments.climbs import (
        climbs_from,
        exact_distances,
        is_rounding,
        starts_of_families,
        starts_of_survey,
    )
    from sipit.experiments.cuts import few_cuts
    from sipit.experiments.record import dated_head
    from sipit.storage import require_writable

    if options.json is not None:
        require_writable(options.json)
    if options.longest < 2 or min(options.texts, options.pairs) < 1 or options.climb < 0:
        raise OptionError("--longest must be at least 2, --texts and --pairs at least 1 and --climb 0 or more")
    if options.survey is not None and options.text:
        raise OptionError("families grow from --survey FOLDER or from --text, not from both; leave one out")
    if options.survey is not None:
        StateFolder(options.survey)
    lm = loaded(options.model, options)
    cuts = cuts_of(lm, options, default=few_cuts(lm))
    folder = None if options.survey is None else surveyed_folder(lm, options.survey)
    similar: list[str] = []
    if folder is not None:
        similar = similar_texts(lm, folder, cuts[-1], n=max(options.texts, _ORDERED))
        texts = similar[: options.texts]
    else:
        texts = options.text or sample_texts(
            n_prose=-(-options.texts // 2), n_code=options.texts // 2, seed=options.seed
        )
    families = family_prompts(
        lm, texts, similar=similar[:_ORDERED], counts=run_lengths(options.longest), seed=options.seed
    )
    with CountDisplay(0) as display:
        results = survey_families(
            lm, families, cuts, threshold=options.threshold, seed=options.seed, on_step=display.phase("prompts run")
        )
        exact = exact_distances(lm, results)
        print(
            f"{'family':>18} {'layer':>6} {'prompts':>8} {'closest':>10} {'/ norm':>8} {'/ median':>8} "
            f"{'float64':>9} {'equal':>6} {'collide':>8}"
        )
        for result, distance in zip(results, exact, strict=True):
            if result.pairs:
                near = result.pairs[0]
                print(
                    f"{result.family:>18} {layer_name(result.layer, result.site):>6} {result.n_prompts:>8} "
                    f"{near.distance:10.4g} {short(near.relative_to_norm)} {short(near.relative_to_median)} "
                    f"{distance:9.2g} {result.n_equal:>6} {result.n_collisions:>8}  "
                    f"{near.first_label} | {near.second_label}"
                )
        climbs: list[dict[str, Any]] = []
        if options.climb:
            starts = (
                starts_of_families(results, exact)
                if folder is None
                else starts_of_survey(lm, folder, cuts, n=options.pairs)
            )
            tell = display.phase("climbs done")
            for start, found in climbs_from(
                lm, starts, rounds=options.climb, threshold=options.threshold, seed=options.seed
            ):
                climbs.append({"family": start.family, **asdict(found)})
                print(_climb_line(start.family, found, lm), flush=True)
                tell(len(climbs), len(starts))
    same = sum(d is not None and is_rounding(r.pairs[0].distance, d) for r, d in zip(results, exact, strict=True))
    if same:
        say(
            f"{same} of these closest pairs have the same state in exact arithmetic: run in float64, less than a "
            "millionth of their distance is left, the rest was rounding"
        )
    records = [{**asdict(r), "float64_distance": d} for r, d in zip(results, exact, strict=True)]
    source = {"survey": None if folder is None else folder.manifest["source"], "similar": similar}
    write(options.json, {**dated_head(lm), "texts": texts, **source, "families": records, "climbs": climbs})
    return 0


def run_constructed(options: argparse.Namespace) -> int:
    """Run `sipit collisions constructed`."""
    from sipit.cli.display import CountDisplay
    from sipit.collisions import constructed_cases
    from sipit.experiments.record import dated_head
    from sipit.storage import require_writable

    if options.json is not None:
        require_writable(options.json)
    lm = None if options.tiny else loaded(options.model, options)
    with CountDisplay(0) as display:
        cases = constructed_cases(
            lm, threshold=options.threshold, seed=options.seed, on_step=display.phase("groups of cases done")
        )
    wrong = 0
    for case in cases:
        is_expected = case.found == (case.expected == "collides")
        wrong += not is_expected
        nearest = "no finite pair" if case.distance is None else f"closest {case.distance:.3g}"
        print(
            f"{case.name}: {'collides' if case.found else 'does not'} ({'' if is_expected else 'NOT '}as expected), "
            f"{case.n_pairs} pairs, {case.n_equal} equal, "
            f"{case.n_collisions} within {case.threshold:g}, {nearest}"
            + (f", {case.n_not_finite} states not finite" if case.n_not_finite else "")
        )
        print(f"    {case.what}")
    write(options.json, {**({} if lm is None else dated_head(lm)), "cases": [asdict(case) for case in cases]})
    return 1 if wrong else 0


def run_precision(options: argparse.Namespace) -> int:
    """Run `sipit collisions precision`."""
    from sipit.cli.display import CountDisplay
    from sipit.collisions import family_prompts, precision_survey
    from sipit.collisions.families import run_lengths
    from sipit.experiments.cuts import few_cuts
    from sipit.experiments.record import dated_head
    from sipit.storage import require_writable

    if options.json is not None:
        require_writable(options.json)
    if options.prompts < 2:
        raise OptionError(f"--prompts is {options.prompts}; a closest pair needs at least 2")
    lm = loaded(options.model, options)
    cuts = cuts_of(lm, options, default=few_cuts(lm))
    if options.families:
        families = family_prompts(lm, counts=run_lengths(16), seed=options.seed)
        families.pop("repeated_token", None)  # equal in exact arithmetic, whatever the weights
        different = {tuple(m.ids.tolist()): m.ids for members in families.values() for m in members}
        prompts, source = list(different.values())[: options.prompts], {"name": "families"}
    else:
        prompts, source = prompts_of(lm, options)
    with CountDisplay(0) as display:
        results = precision_survey(
            lm, prompts, cuts, **({"precisions": options.precision} if options.precision else {}),
            threshold=options.threshold, seed=options.seed, on_step=display.phase("prompts run"),
        )  # fmt: skip
    print(
        f"{'layer':>6} {'weights':>19} {'error':>8} {'closest':>10} {'/ norm':>8} {'/ median':>8} {'equal':>6} "
        f"{'collide':>8}"
    )
    for result in sorted(results, key=lambda r: (r.layer, r.site)):
        distance = float("nan") if result.distance is None else result.distance
        print(
            f"{layer_name(result.layer, result.site):>6} {result.precision:>19} {result.weight_error:8.2%} "
            f"{distance:10.4g} {short(result.relative_to_norm)} {short(result.relative_to_median)} "
            f"{result.n_equal:>6} {result.n_collisions:>8}"
        )
    write(
        options.json,
        {**dated_head(lm), "source": source, "n_prompts": len(prompts), "results": [asdict(r) for r in results]},
    )
    return 0


def _climb_line(family: str, found: Climb, lm: LanguageModel) -> str:
    return (
        f"climb from {family} at layer {layer_name(found.layer, found.site)}: {found.steps[0].distance:.4g} → "
        f"{found.distance:.4g} ({short(found.relative_to_norm).strip()} of the norm), "
        f"{found.n_evaluated} pairs tried, {'a COLLISION' if found.is_within else 'no collision'}: "
        f"{shown(lm, found.first_ids)} | {shown(lm, found.second_ids)}"
    )
