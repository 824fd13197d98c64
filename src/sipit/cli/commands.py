"""One function a command: from parsed options to one call of the library, and its result in print.

Everything heavy is imported inside, after the arguments were understood.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sipit.cli.last import fit_last, inverted_last, is_last_asked, last_options
from sipit.cli.messages import refuse, say, say_verdict
from sipit.cli.workers import workers_of
from sipit.errors import InputError, OptionError, SipitError, StorageError

if TYPE_CHECKING:
    from sipit.inversion import Inversion
    from sipit.models import LanguageModel
    from sipit.observations import Cut, Observation
    from sipit.observations.formats import Wanted
    from sipit.workers import Workers

_PARAGRAPH = (
    "Dear Maria, the results came back this morning and they are better than we feared. "
    "Please call me before you speak to anyone at the clinic; my new number ends in 4471."
)


_DEMO_OPTIONS = Namespace(
    max_tokens=None,
    length=None,
    seconds=None,
    policy="auto",
    noise=0.0,
    exhaustive=False,
    max_batch=256,
    seed=0,
    no_fit=False,
    resume=None,
    shuffled=False,
    permuted=False,
    pass_dtype=None,
)


def demo(options: Namespace) -> int:
    """Run `sipit demo`."""
    from sipit.inversion import certificate_of, check_certificate

    if options.port is not None and not options.web:
        raise OptionError("--port is of the page that --web serves; pass --web as well")
    lm = loaded(options.model, options)
    if options.web:
        return _served(lm, options)
    layer, site = cut_of(lm, options.layer or str(lm.n_layers // 2))
    seen = lm.capture(_PARAGRAPH, layer=layer, site=site)
    say(
        f"One ordinary forward pass of a paragraph through {layer} of the {lm.n_layers} blocks of {lm.name}"
        f"{' and its final norm' if site == 'final' else ''} left "
        f"{seen.seq_len} vectors of {seen.d_model} numbers. The paragraph is forgotten; the vectors remain."
    )
    found = _inverted(lm, seen, _DEMO_OPTIONS)
    _print_text(found)
    replay = check_certificate(certificate_of(found), seen, lm)
    if replay.largest_distance is not None:
        say(
            "evidence  one more ordinary forward pass, of the recovered tokens, ends within "
            f"{replay.largest_distance:.2g} of every observed state (tolerance {replay.tolerance:.2g})"
        )
    expected = lm.decode(lm.encode(_PARAGRAPH))  # with the BOS token, where the tokenizer adds one
    is_exact = replay.holds and found.text == expected
    say(f"exact     {'yes' if is_exact else 'NO'}: compared with the paragraph, byte for byte")
    chosen = "" if options.dtype == "auto" else f" --dtype {options.dtype}"
    chosen += f" --quantize {options.quantize}" if options.quantize is not None else ""
    model = f"--model {shlex.quote(options.model)}{chosen}"
    named = "final" if site == "final" else layer
    say(f"next      sipit capture --text 'your own text' {model} --layer {named} --out mine.safetensors")
    say(f"          sipit invert mine.safetensors {model}")
    return 0 if is_exact else 1


def _served(lm: LanguageModel, options: Namespace) -> int:
    """Serve the page until Ctrl-C, which is how it is meant to end."""
    from threading import Event

    from sipit.web import serving

    with serving(lm, port=options.port) as address:
        say(f"{address}  open it in a browser; Ctrl-C stops it")
        try:
            Event().wait()
        except KeyboardInterrupt:
            say("stopped")
    return 0


def capture(options: Namespace) -> int:
    """Run `sipit capture`."""
    from sipit.observations import OF_ONE_LAYER, dtype_named, write_observation, write_observations
    from sipit.storage import require_writable

    require_writable(options.out)
    if options.chat and options.ids is not None:
        raise OptionError("--chat wraps a text, but --ids gives token ids; leave one of them out")
    if options.store_dtype is not None:
        dtype_named(options.store_dtype)
    if options.layer is None and options.site not in OF_ONE_LAYER:
        raise OptionError(
            f"site {options.site!r} needs a layer: pass --layer with a number of blocks run"
            + (", or 'final'" if options.site == "block" else "")
        )
    if options.layer == "final":
        options.site, options.layer = "final", None
    layer = None if options.layer is None else int(options.layer)
    prompts = _prompts_of(options)
    lm = loaded(options.model, options)
    observations = [
        lm.capture(prompt, layer=layer, site=options.site, dtype=options.store_dtype, chat=options.chat)
        for prompt in prompts
    ]
    if options.last:
        observations = [seen.last_rows(1) for seen in observations]
    if options.lines_file is None:
        write_observation(observations[0], options.out)
    else:
        write_observations(observations, options.out)
    first = observations[0]
    say(
        f"{options.out}: {len(observations)} prompt{'s' if len(observations) > 1 else ''}, "
        f"{sum(seen.seq_len for seen in observations)} states of width {first.d_model} in {first.dtype}, "
        f"layer {first.layer}, site {first.site}, model {lm.name}"
    )
    return 0


def invert(options: Namespace) -> int:
    """Run `sipit invert`."""
    from sipit.inversion import SearchOptions
    from sipit.observations import holds_many, read_each, read_observation
    from sipit.observations.formats import is_foreign
    from sipit.storage import require_writable

    if options.noise == "auto":
        _refuse_beside_auto(options)
    else:
        SearchOptions(**_search_options(options))  # refuses what no search can run with
    last_options(options)
    if options.redact and options.json is None:
        raise OptionError("--redact leaves the prompt out of what --json writes; pass --json OUT as well")
    if options.resume is not None:
        require_writable(options.resume)
    if is_foreign(options.file):
        return _invert_dumps(options)
    if holds_many(options.file):
        return _invert_all(options, list(read_each(options.file)))
    _refuse_ray_for_one(options)
    seen = read_observation(options.file)
    said = wanted_of(options)
    if (said.layer or seen.layer, said.site or seen.site) != (seen.layer, seen.site):
        raise OptionError(f"{options.file} was captured at {seen.cut} and says so; leave --layer and --site out")
    if options.json is not None:
        require_writable(options.json)
    if options.any_model:
        seen = replace(seen, fingerprint=None)
    lm = loaded(_model_of(options, seen), options)
    return _invert_one(options, lm, _placed(options, lm, seen))


def _invert_one(options: Namespace, lm: LanguageModel, seen: Observation, truth: tuple[int, ...] | None = None) -> int:
    """Invert one observation; `truth` is what lay beside it, which only the answer is compared with."""
    from sipit.inversion import require_belongs

    try:
        require_belongs(lm, seen)
    except SipitError as error:
        raise type(error)(f"{options.file}: {error}") from error
    found = _inverted(lm, seen, options)
    _print_text(found)
    if truth is not None:
        is_exact = found.input_ids == truth
        say(f"exact     {'yes' if is_exact else 'NO'}: compared with the token ids that lie beside the states")
    if options.json is not None:
        from sipit.inversion import write_certificate

        write_certificate(found, options.json, is_redacted=options.redact)
    return 0 if found.verdict == "recovered" else 1


def _invert_dumps(options: Namespace) -> int:
    """Invert what another tool wrote, at the place that the file or the user names."""
    from sipit.observations.formats import Dump, observation_of, read_dumps, settled_dumps, unpadded
    from sipit.storage import require_writable

    wanted = wanted_of(options)
    settled = settled_dumps(list(read_dumps(options.file, wanted)), wanted)
    entries = [unpadded(entry) if isinstance(entry, Dump) else entry for entry in settled]
    dumps = [dump for dump in entries if isinstance(dump, Dump)]
    if not dumps:
        raise next(error for error in entries if isinstance(error, SipitError))
    if options.model is None:
        raise OptionError(f"{options.file} does not say which model it came from; name one with --model")
    for dump in dumps:
        say(f"{dump.name}: {'; '.join(dump.notes)}")
    if len(entries) == 1:
        _refuse_ray_for_one(options)
        if options.json is not None:
            require_writable(options.json)
    lm = loaded(options.model, options)
    if len(entries) == 1:
        seen, truth = observation_of(dumps[0], lm.shape), dumps[0].input_ids
        prefix = _known_prefix(options, lm)
        if truth is not None and len(truth) == len(prefix) + seen.seq_len:
            truth = truth[len(prefix) :]  # the ids that lie beside a suffix are often those of the whole prompt
        return _invert_one(options, lm, _placed(options, lm, seen), truth)
    named: list[tuple[str, Observation | SipitError]] = []
    for number, entry in enumerate(entries):
        if isinstance(entry, SipitError):
            named.append((f"{options.file}: entry {number}", entry))
            continue
        try:
            named.append((entry.name, _placed(options, lm, observation_of(entry, lm.shape))))
        except SipitError as error:
            named.append((entry.name, error))
    return _invert_all(options, named, lm)


def _placed(options: Namespace, lm: LanguageModel, seen: Observation) -> Observation:
    """Return an observation at the positions, and behind the tokens, that the user says."""
    if options.positions is not None:
        positions = _positions_of(options.positions)
        if len(positions) != seen.seq_len:
            raise OptionError(f"--positions names {len(positions)} positions, the file holds {seen.seq_len} rows")
        seen = replace(seen, positions=tuple(positions))
    if is_last_asked(options):
        seen = seen.last_rows(seen.seq_len)
    return seen.behind(_known_prefix(options, lm))


def _positions_of(text: str) -> Sequence[int]:
    """Return the positions that a list or a range names."""
    bounds = ids_of(text.replace(":", ","), "--positions")
    if ":" not in text:
        return bounds
    if text.count(":") > 2 or "," in text or len(bounds) != text.count(":") + 1 or bounds[-1] < 1:
        raise OptionError(f"--positions {text[:40]!r} is no range; say FIRST:END or FIRST:END:STEP, the end left out")
    return range(*bounds)


def _known_prefix(options: Namespace, lm: LanguageModel) -> list[int]:
    """Return the token ids that the user says stand before the first row."""
    if options.prefix_ids is not None:
        return ids_of(options.prefix_ids, "--prefix-ids")
    if options.prefix_text is not None:
        return [int(i) for i in lm.encode(_valid(options.prefix_text) or "")]
    if options.prefix_template is not None:
        return [int(i) for i in lm.encode_template_prefix(_valid(options.prefix_template) or None)]
    return []


def wanted_of(options: Namespace, layer: int | None = None, site: str | None = None) -> Wanted:
    """Return what the user said of a file; `layer` and `site` where a certificate says it instead."""
    from sipit.observations.formats import Wanted

    if options.layer == "final":
        site = "final"
    elif options.layer is not None:
        layer = int(options.layer)
    return Wanted(
        layer=layer,
        site=options.site or site,
        key=options.key,
        prompt=options.prompt,
        layers=None if options.layers is None else tuple(ids_of(options.layers, "--layers")),
        dtype=options.states_dtype,
    )


def _invert_all(
    options: Namespace, entries: list[tuple[str, Observation | SipitError]], lm: LanguageModel | None = None
) -> int:
    """Invert many observations: a line of JSON each, those already in the output passed over."""
    from sipit.cli.display import CountDisplay
    from sipit.inversion import SearchOptions, certificate_of, invert_many, redacted
    from sipit.observations import Observation
    from sipit.storage import LineLog

    for name, entry in entries:
        if isinstance(entry, SipitError):
            refuse(name, entry)
    named = [
        (name, replace(entry, fingerprint=None) if options.any_model else entry)
        for name, entry in entries
        if isinstance(entry, Observation)
    ]
    if not named:
        raise InputError(f"{options.file} holds nothing that can be inverted as asked; the reasons stand above")
    log = None if options.json is None else LineLog(options.json, is_private=True)
    digests = {name: seen.digest() for name, seen in named}
    records = [] if log is None else log.records()
    done = {record.get("observation_sha256") for record in records}
    recovered = {record.get("observation_sha256") for record in records if record.get("verdict") == "recovered"}
    waiting = [(name, seen) for name, seen in named if digests[name] not in done]
    if len(waiting) < len(named):
        say(f"{options.json} already holds {len(named) - len(waiting)} of {len(named)} observations; going on")
    n_recovered = sum(digest in recovered for digest in digests.values())
    n_refused = len(entries) - len(named)
    if waiting:
        naming = next((seen for _, seen in waiting if seen.model is not None), waiting[0][1])
        lm = lm or loaded(_model_of(options, naming), options)
        fitting = _fitting(lm, waiting)
        alone = {
            "--noise auto": options.noise == "auto",
            "--shuffled": options.shuffled,
            "--permuted": options.permuted,
        }
        for name in (name for name, is_given in alone.items() if is_given):
            raise OptionError(f"{name} takes one prompt at a time; name one with --prompt, or a file of one")
        n_refused += len(waiting) - len(fitting)
        there = nullcontext() if options.ray is None else _workers(options, lm, naming)
        with CountDisplay(len(fitting)) as display, there as workers:
            found_all = invert_many(
                lm,
                [seen for _, seen in fitting],
                SearchOptions(use_fit=not options.no_fit, **_search_options(options)),
                last=last_options(options),
                workers=workers,
                on_fit=lambda cut, n: say(f"fitting an inverse for {cut}: {n} tokens pay for it"),
                on_fit_progress=display.fitting,
            )
            for (name, _), found in zip(fitting, found_all, strict=True):
                n_recovered += found.verdict == "recovered"
                if log is not None:
                    record = certificate_of(found)
                    log.append({"file": name, **(redacted(record) if options.redact else record)})
                print(json.dumps({"file": name, "verdict": found.verdict, "text": found.text}, ensure_ascii=False))
                display.step(found.seq_len)
    refused = f", refused {n_refused}" if n_refused else ""
    say(f"recovered {n_recovered} of {len(entries)} prompts{refused}")
    return 0 if n_recovered == len(entries) else 1


def _refuse_ray_for_one(options: Namespace) -> None:
    if options.ray is not None:
        raise OptionError(f"--ray shares many prompts out, and {options.file} holds one; leave it out")


def _workers(options: Namespace, lm: LanguageModel, seen: Observation) -> AbstractContextManager[Workers]:
    return workers_of(
        options.ray,
        lm,
        model=_model_of(options, seen),
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
    )


def _fitting(lm: LanguageModel, named: list[tuple[str, Observation]]) -> list[tuple[str, Observation]]:
    """Return the observations that can be this model's; report each other one, with the reason."""
    from sipit.inversion import require_belongs

    fitting = []
    for name, seen in named:
        try:
            require_belongs(lm, seen)
        except SipitError as error:
            refuse(name, error)
        else:
            fitting.append((name, seen))
    return fitting


def fit(options: Namespace) -> int:
    """Run `sipit fit`."""
    from sipit.cli.display import CountDisplay
    from sipit.inversion.fitting import fit_inverse
    from sipit.inversion.inverses.store import fit_path, load_fit
    from sipit.storage import require_writable, write_json

    if options.json is not None:
        require_writable(options.json)
    texts = [text_of(path) for path in options.text]
    lm = loaded(options.model, options)
    cuts = [cut_of(lm, layer) for layer in options.layer]
    if options.last:
        return fit_last(lm, cuts, options, texts)
    there = {} if options.again else {cut: fit_path(lm, cut) for cut in cuts if load_fit(lm, cut) is not None}
    for path in there.values():
        say(f"{path} is there already; pass --again to fit anew")
    missing = [cut for cut in cuts if cut not in there]
    files = dict(there)
    if missing:
        with CountDisplay(0) as display:
            files |= fit_inverse(lm, missing, texts=texts, on_progress=display.fitting)
    reports = []
    for cut, path in files.items():
        made = load_fit(lm, cut)
        if made is None:
            raise StorageError(f"{path} was written but cannot be read back; fit again")
        reports.append(made.report)
        say(f"{path}: {made.report['fit_block_tokens']} block-tokens, {made.report['seconds']:.0f} s")
        print(f"layer {cut[0]}, site {cut[1]}, rank of the right token on held-out text (0 is best)")
        for kind, both in made.report["held_out"].items():
            own = both["alone"]
            print(
                f"  {kind:12s} first {100 * own['top_1']:5.1f} %   in 16 {100 * own['top_16']:5.1f} %   "
                f"mean rank {own['mean_rank']:.2f}"
            )
    if options.json is not None:
        write_json(options.json, {"model": lm.name, "fingerprint": lm.fingerprint, "fits": reports})
    return 0


def bench(options: Namespace) -> int:
    """Run `sipit bench`."""
    from sipit.cli.display import CountDisplay
    from sipit.experiments import bench as experiment
    from sipit.report.cost import draw_cost
    from sipit.report.plots import require_drawable
    from sipit.storage import require_writable, write_json

    if options.json is not None:
        require_writable(options.json)
    if options.figure is not None:
        require_drawable(options.figure)
        require_writable(options.figure)
    if (options.text_file is None) != options.random_ids:
        raise OptionError("bench needs prompts: pass either --text-file or --random-ids")
    if options.tokens < 1 or options.prompts < 1:
        raise OptionError("--tokens and --prompts must be at least 1")
    text = None if options.random_ids else text_of(options.text_file)
    methods = options.method or ["auto", "auto-no-fit", "vocabulary-matching"]
    experiment.require_methods(methods)
    lm = loaded(options.model, options)
    cuts = [cut_of(lm, layer) for layer in options.layer]
    sizes = {"n_tokens": options.tokens, "n_prompts": options.prompts}
    if text is None:
        prompts = experiment.random_prompts(lm, seed=options.seed, **sizes)
    else:
        prompts = experiment.prompts_from_text(lm, text, **sizes)
    runs = []
    with CountDisplay(len(cuts) * len(prompts) * len(methods)) as display:
        for run in experiment.bench(
            lm, prompts, cuts=cuts, methods=methods, seed=options.seed, max_seconds=options.max_seconds
        ):
            runs.append(run)
            display.step(run.seq_len)
    print(experiment.table(runs))
    record = experiment.bench_record(lm, runs)
    if options.json is not None:
        write_json(options.json, record)
    if options.figure is not None:
        draw_cost([record], options.figure)
    return 0 if all(run.exact for run in runs) else 1


def check(options: Namespace) -> int:
    """Run `sipit check`."""
    from sipit.inversion import check_certificate, read_certificate
    from sipit.models import PASSES, in_pass
    from sipit.observations import DTYPES, read_observation
    from sipit.observations.formats import is_foreign
    from sipit.storage import require_writable, write_json

    record = read_certificate(options.certificate)
    seen = None if is_foreign(options.file) else read_observation(options.file)
    if options.json is not None:
        require_writable(options.json)
    named = str(record.get("model_dtype")) if options.dtype is None and options.quantize is None else ""
    options.dtype = options.dtype or (named if named in DTYPES else "auto")
    lm = loaded(options.model or record["model"], options)
    if named in PASSES and named not in DTYPES:
        lm = in_pass(lm, named)
    seen = seen or _recorded_dump(options, record, lm)
    outcome = check_certificate(record, seen, lm)
    if options.json is not None:
        write_json(options.json, asdict(outcome))
    if outcome.holds and not outcome.is_proof:
        print(
            f"holds: {seen.seq_len} tokens, verdict {outcome.verdict}; what the claimed tokens leave of the rows is "
            "such noise as the record says; that is no proof, and the posterior is the search's own word"
        )
        return 0
    if outcome.holds:
        print(
            f"holds: {seen.seq_len} tokens, verdict {outcome.verdict}; one ordinary forward pass puts every state "
            f"within tolerance (largest distance {outcome.largest_distance:.2g}, tolerance {outcome.tolerance:.2g})"
            + (
                f"; the tolerance includes the noise of {record['noise']:.3g} that was declared"
                if record["noise"]
                else ""
            )
        )
        return 0
    print(f"does not hold: {'; '.join(outcome.reasons)}")
    return 1


def _recorded_dump(options: Namespace, record: dict[str, Any], lm: LanguageModel) -> Observation:
    """Return the observation in another tool's file that a certificate is about, by its digest."""
    from sipit.observations.formats import Dump, observation_of, read_dumps, settled_dumps, unpadded

    layer, site = record.get("layer"), record.get("site")
    if type(layer) is not int or not isinstance(site, str):
        raise InputError(f"{options.certificate} names no layer and site; it is not what 'sipit invert --json' writes")
    wanted = wanted_of(options, None if site == "final" else layer, site)
    found = []
    for entry in settled_dumps(list(read_dumps(options.file, wanted)), wanted):
        if isinstance(entry, Dump):
            found.append(observation_of(unpadded(entry), lm.shape))
        elif not found:
            raise entry
    named = [seen for seen in found if seen.digest() == record.get("observation_sha256")]
    return (named or found)[0]


def loaded(name: str, options: Namespace) -> LanguageModel:
    from sipit.cli.display import waiting

    with waiting(f"loading {name}"):
        from sipit.models import load

        return load(name, device=options.device, dtype=options.dtype, quantize=options.quantize)


def noise_of(text: str) -> float | str:
    """Return what --noise says: an L2 distance, or that the noise is to be estimated."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes an L2 distance or 'auto', got {text!r}") from None


def _refuse_beside_auto(options: Namespace) -> None:
    """Refuse options that a decoding under a noise model has no use for."""
    given = [
        name
        for name, is_given in (
            ("--policy", options.policy != "auto"),
            ("--pass-dtype", options.pass_dtype is not None),
            ("--resume", options.resume is not None),
        )
        if is_given
    ]
    if given:
        raise OptionError(f"--noise auto seeks the most probable prompt, in which {given[0]} has no part; leave it out")


def _inverted(lm: LanguageModel, seen: Observation, options: Namespace) -> Inversion:
    """Run one search under the live display; on Ctrl-C print the recovered prefix first."""
    from sipit.inversion import holds_last_alone

    if holds_last_alone(seen):
        return inverted_last(lm, seen, options)
    from sipit.cli.display import SearchDisplay
    from sipit.inversion import PrefixFile
    from sipit.inversion import invert as run

    kept = None if options.resume is None else PrefixFile(options.resume, seen)
    if kept is not None and not all(0 <= i < lm.vocab_size for i in kept.input_ids):
        raise InputError(
            f"{options.resume} holds a token id outside the vocabulary (0 to {lm.vocab_size - 1}); name another file"
        )
    with SearchDisplay(lm, seen.seq_len) as display:
        try:
            found = run(
                lm,
                seen,
                is_shuffled=options.shuffled,
                is_permuted=options.permuted,
                use_fit=not options.no_fit,
                hint=() if kept is None else kept.input_ids,
                on_progress=display.update if kept is None else display.also(kept.update),
                **_search_options(options),
            )
        except KeyboardInterrupt:
            display.close()
            if kept is not None:
                kept.save(display.input_ids)
            _print_bytes(lm.decode(display.input_ids) or _joined(display.input_ids))
            say(f"stopped after {len(display.input_ids)} of {seen.seq_len} tokens; the prefix above is recovered")
            raise
    if kept is not None:
        kept.remove()
    say_verdict(found)
    return found


def _search_options(options: Namespace) -> dict[str, Any]:
    names = ("policy", "noise", "exhaustive", "max_batch", "seed", "pass_dtype")
    return {name: getattr(options, name) for name in names}


def layer_text(name: str) -> str:
    """Refuse what no --layer option can name; whether a model has that layer, `cut_of` finds out."""
    if name != "final" and not (name.isascii() and name.isdigit() and len(name) < 10):
        raise argparse.ArgumentTypeError(f"takes a number of blocks or 'final', got {name!r}")
    return name


def cut_of(lm: LanguageModel, name: str) -> Cut:
    """Return the layer and site that a --layer option names."""
    from sipit.observations import Cut

    if name == "final":
        return lm.final_cut
    return Cut(lm.checked_layer(int(name), "block"))


def _prompts_of(options: Namespace) -> list[Any]:
    if options.lines_file is not None:
        lines = [line for line in text_of(options.lines_file).split("\n") if line]
        if not lines:
            raise InputError(f"{options.lines_file} holds no line to capture; write one prompt a line")
        return lines
    if options.ids is not None:
        return [ids_of(options.ids)]
    return [_valid(options.text) if options.text_file is None else text_of(options.text_file)]


def _model_of(options: Namespace, seen: Observation) -> str:
    name = options.model or seen.model
    if name is None:
        raise OptionError(f"{options.file} does not say which model it came from; name one with --model")
    return str(name)


def text_of(path: Path) -> str:
    from sipit.storage import require_file

    require_file(path)  # a device without end would fill the memory, a pipe would block
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; check the file's name") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def _valid(text: str | None) -> str | None:
    """Refuse bytes on the command line that are not UTF-8."""
    try:
        if text is not None:
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"--text is not UTF-8 text (at character {error.start}); pass it in a file with --text-file"
        ) from error
    return text


def ids_of(text: str, option: str = "--ids") -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise OptionError(f"{option} takes whole numbers separated by commas, got {text[:40]!r}") from error


def _print_text(found: Inversion) -> None:
    _print_bytes(found.text if found.text is not None else _joined(found.input_ids))


def _joined(input_ids: tuple[int, ...]) -> str:
    return ",".join(map(str, input_ids))


def _print_bytes(text: str) -> None:
    """Write the text byte for byte; a newline of our own only on a terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))
    if sys.stdout.isatty():
        sys.stdout.buffer.write(b"\n")
    sys.stdout.flush()
