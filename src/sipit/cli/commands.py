"""One function a command: from parsed options to one call of the library, and its result in print.

Everything heavy is imported inside, after the arguments were understood.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sipit.errors import InputError, OptionError, StorageError

if TYPE_CHECKING:
    from sipit.inversion import Inversion
    from sipit.models import LanguageModel
    from sipit.observations import Observation

_PARAGRAPH = (
    "Dear Maria, the results came back this morning and they are better than we feared. "
    "Please call me before you speak to anyone at the clinic; my new number ends in 4471."
)


def demo(options: Namespace) -> int:
    """Run `sipit demo`."""
    from sipit.inversion.certificate import certificate_of, check_certificate

    lm = _loaded(options.model, options)
    layer = lm.n_layers // 2 if options.layer is None else options.layer
    seen = lm.capture(_PARAGRAPH, layer=layer)
    _say(
        f"One ordinary forward pass of a paragraph through {layer} of the {lm.n_layers} blocks of {lm.name} left "
        f"{seen.seq_len} vectors of {seen.d_model} numbers. The paragraph is forgotten; the vectors remain."
    )
    found = _inverted(lm, seen, Namespace(policy="auto", noise=0.0, exhaustive=False, max_batch=256, seed=0))
    _print_text(found)
    replay = check_certificate(certificate_of(found), seen, lm)
    if replay.largest_distance is not None:
        _say(
            "evidence  one more ordinary forward pass, of the recovered tokens, ends within "
            f"{replay.largest_distance:.2g} of every observed state (tolerance {replay.tolerance:.2g})"
        )
    expected = lm.decode(lm.encode(_PARAGRAPH))  # with the BOS token, where the tokenizer adds one
    is_exact = replay.holds and found.text == expected
    _say(f"exact     {'yes' if is_exact else 'NO'}: compared with the paragraph, byte for byte")
    return 0 if is_exact else 1


def capture(options: Namespace) -> int:
    """Run `sipit capture`."""
    from sipit.observations import dtype_named, write_observation
    from sipit.storage import require_writable

    require_writable(options.out)
    if options.chat and options.ids is not None:
        raise OptionError("--chat wraps a text, but --ids gives token ids; leave one of them out")
    text = _valid(options.text) if options.text_file is None else _text_of(options.text_file)
    ids = None if options.ids is None else _ids_of(options.ids)
    if options.store_dtype is not None:
        dtype_named(options.store_dtype)
    lm = _loaded(options.model, options)
    seen = lm.capture(
        text,
        input_ids=ids,
        layer=options.layer,
        site=options.site,
        dtype=options.store_dtype,
        chat=options.chat,
    )
    write_observation(seen, options.out)
    _say(
        f"{options.out}: {seen.seq_len} states of width {seen.d_model} in {seen.dtype}, "
        f"layer {seen.layer}, site {seen.site}, model {lm.name}"
    )
    return 0


def invert(options: Namespace) -> int:
    """Run `sipit invert`."""
    from sipit.inversion import write_certificate
    from sipit.observations import read_observation
    from sipit.storage import require_writable

    seen = read_observation(options.file)
    if options.json is not None:
        require_writable(options.json)
    if options.any_model:
        seen = replace(seen, fingerprint=None)
    lm = _loaded(_model_of(options, seen), options)
    found = _inverted(lm, seen, options)
    _print_text(found)
    if options.json is not None:
        write_certificate(found, options.json)
    return 0 if found.verdict == "recovered" else 1


def check(options: Namespace) -> int:
    """Run `sipit check`."""
    from sipit.inversion import check_certificate
    from sipit.inversion.certificate import read_certificate
    from sipit.observations import read_observation
    from sipit.storage import require_writable, write_json

    record = read_certificate(options.certificate)
    seen = read_observation(options.file)
    if options.json is not None:
        require_writable(options.json)
    lm = _loaded(options.model or record["model"], options)
    outcome = check_certificate(record, seen, lm)
    if options.json is not None:
        write_json(options.json, asdict(outcome))
    if outcome.holds:
        print(
            f"holds: {seen.seq_len} tokens, verdict {outcome.verdict}; one ordinary forward pass puts every state "
            f"within tolerance (largest distance {outcome.largest_distance:.2g}, tolerance {outcome.tolerance:.2g})"
        )
        return 0
    print(f"does not hold: {'; '.join(outcome.reasons)}")
    return 1


def _loaded(name: str, options: Namespace) -> LanguageModel:
    from sipit.cli.display import waiting

    with waiting(f"loading {name}"):
        from sipit.models import load

        return load(name, device=options.device, dtype=options.dtype)


def _inverted(lm: LanguageModel, seen: Observation, options: Namespace) -> Inversion:
    """Run the search under the live display; on Ctrl-C print the recovered prefix first."""
    from sipit.cli.display import SearchDisplay
    from sipit.inversion import invert as run

    with SearchDisplay(lm, seen.seq_len) as display:
        try:
            found = run(
                lm,
                seen,
                policy=options.policy,
                noise=options.noise,
                exhaustive=options.exhaustive,
                max_batch=options.max_batch,
                seed=options.seed,
                on_progress=display.update,
            )
        except KeyboardInterrupt:
            display.close()
            _print_bytes(lm.decode(display.input_ids) or _joined(display.input_ids))
            _say(f"stopped after {len(display.input_ids)} of {seen.seq_len} tokens; the prefix above is recovered")
            raise
    _say(f"verdict   {found.summary()}")
    _say(
        f"cost      {found.seconds:.1f} s, {found.n_checked} candidates, {found.block_tokens} block-tokens: "
        f"{found.prefill_ratio:.2f} times the forward pass that made the states"
    )
    return found


def _model_of(options: Namespace, seen: Observation) -> str:
    name = options.model or seen.model
    if name is None:
        raise OptionError(f"{options.file} does not say which model it came from; name one with --model")
    return str(name)


def _text_of(path: Path) -> str:
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


def _ids_of(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise OptionError(f"--ids takes whole numbers separated by commas, got {text[:40]!r}") from error


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


def _say(line: str) -> None:
    print(line, file=sys.stderr)
