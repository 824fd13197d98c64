"""Seeded malformed inputs to the command line, and how it must then answer.

One case is one number, which draws everything else. `python -m tests.adversarial.malformed 1000` runs many
and prints a line for each fault; the suite runs a few of the same.

A good answer is exit code 0 or 1 with a right result, or 2 with one sentence on standard error that names
the file and a way out. Nothing is written half, nothing hangs, and memory stays within bounds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sipit
from sipit.cli import main as command_line
from sipit.observations import read_observations
from tests.adversarial.damage import damaged_bytes, damaged_header, damaged_json
from tests.adversarial.scenes import TEXT, Scene, built_scene

_SECONDS = 20  # longest a command may take
_SENTENCE = 400  # characters of a message, at most
_GROWTH = 512 * 2**10  # KiB by which one command may raise the peak of memory


class _Hang(BaseException):
    """A command took too long; no handler of ordinary errors catches it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One malformed input, and what came of it."""

    number: int
    what: str  # the draws, for a person
    outcome: str  # exit code, or "crashed"
    fault: str | None  # why the outcome is wrong; None if it is not


@dataclass(kw_only=True)
class Plan:
    """One command on one malformed input."""

    what: str
    argv: list[str]
    named: str | None  # what the sentence must contain; None: any
    judge: Callable[[int, str], str | None] = field(default=lambda _code, _out: None)  # of exit codes 0 and 1
    may_print: bool = False  # whether standard output may hold lines beside an exit code of 2


def _claimed(scene: Scene, record: Path) -> Callable[[int, str], str | None]:
    """Judge a record of an inversion: recovered means the true prompt."""

    def judge(code: int, _: str) -> str | None:
        if code == 0 and json.loads(record.read_text("utf-8"))["input_ids"] != list(scene.input_ids):
            return "recovered another prompt than the true one"
        return None

    return judge


def _recovers(code: int, out: str) -> str | None:
    return None if (code, out) == (0, TEXT) else f"exit code {code} and {out[:40]!r} where nothing stands in the way"


def _inversion(scene: Scene, file: str, what: str, named: str | None = None) -> Plan:
    argv = ["invert", file, "--model", scene.model, "--no-fit", "--json", "record.json"]
    return Plan(
        what=what, argv=argv, named=file if named is None else named, judge=_claimed(scene, Path("record.json"))
    )


def _observation(rng: random.Random, scene: Scene) -> Plan:
    raw = (scene.folder / "seen").read_bytes()
    how, raw = rng.choice((damaged_bytes, damaged_header, damaged_header))(rng, raw)
    Path("bad").write_bytes(raw)
    about_model = how.startswith(("fingerprint", "a model with", "layer", "the model"))  # whole, but of no such model
    return _inversion(scene, "bad", f"observation file, {how}", "" if about_model else "bad")


def _observation_values(rng: random.Random, scene: Scene) -> Plan:
    """Write tensors that safetensors takes and an observation does not."""
    from safetensors.torch import save_file

    good = scene.seen.states
    states: Any = rng.choice(
        [
            good.to(torch.int32),
            good > 0,
            good[:0],
            good[:, :0],
            good[None],
            good[0],
            good.masked_fill(good > 0.5, torch.nan),
            good.masked_fill(good > 0.5, torch.inf),
            good * 1e30,
            good.half() * 0,
            good[:, :-1],
            good.double(),
            good.to(torch.float8_e4m3fn),
            torch.zeros(2000, 32),
            good.to(torch.complex64),
        ]
    )
    positions = list(range(len(states) if states.ndim else 0))
    metadata = {"format": "sipit.observation", "version": "1", "site": "block", "layer": "2"}
    save_file({"states": states.contiguous()}, "bad", metadata={**metadata, "positions": json.dumps(positions)})
    return _inversion(scene, "bad", f"states of shape {tuple(states.shape)} in {states.dtype}")


def _observation_path(rng: random.Random, scene: Scene) -> Plan:
    how, name = odd_path(rng)
    command = rng.choice(("invert", "check", "check-certificate", "text", "lines", "resume", "json"))
    seen = str(scene.folder / "seen")
    argv = {
        "invert": ["invert", name, "--model", scene.model],
        "check": ["check", str(scene.folder / "certificate"), name, "--model", scene.model],
        "check-certificate": ["check", name, seen, "--model", scene.model],
        "text": ["capture", "--text-file", name, "--layer", "1", "--out", "out", "--model", scene.model],
        "lines": ["capture", "--lines-file", name, "--layer", "1", "--out", "out", "--model", scene.model],
        "resume": ["invert", seen, "--no-fit", "--model", scene.model, "--resume", name],
        "json": ["invert", seen, "--no-fit", "--model", scene.model, "--json", name],
    }[command]
    return Plan(what=f"{command} on {how}", argv=argv, named=None)


def odd_path(rng: random.Random) -> tuple[str, str]:
    """Make a path that is no ordinary file in the working folder; return what it is, and its name."""
    kind = rng.randrange(12)
    if kind == 0:
        os.mkfifo("pipe")
    elif kind == 1:
        Path("folder").mkdir()
    elif kind == 2:
        Path("loop").symlink_to("loop")
    elif kind == 3:
        Path("dangling").symlink_to("nowhere/at/all")
    elif kind == 4:
        Path("locked").write_bytes(b"x")
        Path("locked").chmod(0)
    names = [
        *[("a pipe", "pipe"), ("a folder", "folder"), ("a loop of links", "loop"), ("a dangling link", "dangling")],
        *[("a locked file", "locked"), ("no name", ""), ("a device without end", "/dev/zero")],
        *[("a device without content", "/dev/null"), ("a name too long", "n" * 5000), ("a lone surrogate", "\udcff")],
        *[("a NUL", "a\0b"), ("a path through a file", "/dev/null/x")],
    ]
    return names[kind]


def _certificate(rng: random.Random, scene: Scene) -> Plan:
    raw = (scene.folder / "certificate").read_bytes()
    how, bad = rng.choice((damaged_bytes, damaged_json, damaged_json))(rng, raw)
    Path("bad").write_bytes(bad)

    def judge(code: int, _: str) -> str | None:
        if code == 0 and {**json.loads(bad), "file": ""} != {**json.loads(raw), "file": ""}:
            return "an edited certificate holds"
        return None

    argv = ["check", "bad", str(scene.folder / "seen"), *rng.choice(([], ["--model", scene.model]))]
    return Plan(what=f"certificate, {how}", argv=argv, named=None if len(argv) == 3 else "bad", judge=judge)


def _log(rng: random.Random, scene: Scene) -> Plan:
    raw = (scene.folder / "log").read_bytes()
    lines = raw.splitlines(keepends=True)
    if rng.randrange(2):
        place = rng.randrange(len(lines))
        how, line = damaged_json(rng, lines[place])
        bad = b"".join([*lines[:place], line.rstrip(b"\n") + b"\n", *lines[place + 1 :]])
    else:
        how, bad = damaged_bytes(rng, raw)
    Path("bad").write_bytes(bad)

    def judge(_: int, out: str) -> str | None:
        now = Path("bad").read_bytes()
        whole = bad[: bad.rfind(b"\n") + 1]
        if not now.startswith(whole):
            return "lines of the log were lost"
        texts = [line["text"] for line in map(json.loads, out.splitlines()) if line.get("verdict") == "recovered"]
        return None if set(texts) <= set(scene.texts) else "recovered another prompt than a true one"

    argv = ["invert", str(scene.folder / "many"), "--model", scene.model, "--no-fit", "--json", "bad"]
    return Plan(what=f"log, {how}", argv=argv, named="bad", judge=judge)


def _many(rng: random.Random, scene: Scene) -> Plan:
    raw = (scene.folder / "many").read_bytes()
    how, bad = rng.choice((damaged_bytes, damaged_header, damaged_header))(rng, raw)
    Path("bad").write_bytes(bad)

    def judge(code: int, out: str) -> str | None:
        lines = [json.loads(line) for line in out.splitlines()] if out.startswith("{") else []
        texts = [line["text"] for line in lines if line.get("verdict") == "recovered"]
        return None if set(texts) <= set(scene.texts) else "recovered another prompt than a true one"

    argv = ["invert", "bad", "--model", scene.model, "--no-fit"]
    return Plan(what=f"file of several, {how}", argv=argv, named="bad", judge=judge, may_print=True)


def _model(rng: random.Random, scene: Scene) -> Plan:
    shutil.copytree(scene.model, "bad")
    file = rng.choice(["config.json"] * 5 + ["model.safetensors"] * 3 + ["tokenizer.json"] * 2)
    others = ["tokenizer_config.json", "generation_config.json"]
    file = rng.choice(others) if rng.randrange(6) == 0 else file
    path = Path("bad") / file
    raw = path.read_bytes()
    kind = rng.randrange(8)
    if kind == 0:
        path.unlink()
        how = "missing"
    elif kind == 1:
        path.unlink()
        how = odd_in_place(rng, path)
    elif file == "config.json" and kind < 7:
        how, raw = odd_config(rng, raw)
        path.write_bytes(raw)
    else:
        mutate = damaged_header if file.endswith("safetensors") else damaged_json
        how, raw = rng.choice((damaged_bytes, mutate, mutate))(rng, raw)
        path.write_bytes(raw)
    argv = [
        "invert",
        str(scene.folder / "seen"),
        "--any-model",
        "--no-fit",
        "--json",
        "record.json",
        "--model",
        "./bad",
    ]
    return Plan(what=f"{file} of a model, {how}", argv=argv, named="bad", judge=_claimed(scene, Path("record.json")))


def odd_in_place(rng: random.Random, path: Path) -> str:
    """Put something that is no ordinary file at a path; return what it is."""
    kind = rng.randrange(3)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.name)
    else:
        os.mkfifo(path)
    return ("a folder", "a loop of links", "a pipe")[kind]


def odd_config(rng: random.Random, raw: bytes) -> tuple[str, bytes]:
    """Change a few values of a config to ones that no model has."""
    config = json.loads(raw)
    odd = [0, -1, 3, 7, 10**5, 10**9, 2**63, 1.5, "x", "", None, True, [], {}, [1, 2], {"a": 1}, "llama", "gpt2", "t5"]
    more = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        "quantization_config": {"quant_method": "nonsense"},
        "rope_scaling": {"rope_type": "nonsense", "factor": "x"},
        "rope_parameters": {"rope_type": "nonsense"},
        "architectures": ["Nonsense"],
        "dtype": "float99",
        "torch_dtype": "nonsense",
        "attn_implementation": "nonsense",
        "model_type": "nonsense",
    }
    changed = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        if rng.randrange(3) == 0:
            key = rng.choice(list(more))
            config[key] = more[key]
        else:
            key = rng.choice(list(config))
            config[key] = rng.choice(odd)
        changed.append(f"{key} = {config[key]!r}")
    return ", ".join(changed), json.dumps(config).encode()


def _gguf(rng: random.Random, scene: Scene) -> Plan:
    raw = bytearray((scene.folder / "model.gguf").read_bytes())
    kind = rng.randrange(6)
    if kind == 0:
        place = 8 * rng.choice((1, 2))  # number of tensors, number of keys
        raw[place : place + 8] = rng.choice((2**63, 2**40, 2**31, 0, 1)).to_bytes(8, "little")
        how = "another count"
    elif kind == 1:
        raw[4:8] = rng.choice((0, 1, 99, 2**32 - 1)).to_bytes(4, "little")
        how = "another version"
    elif kind == 2:
        how, changed = damaged_bytes(rng, bytes(raw))
        raw = bytearray(changed)
    elif kind == 3:
        place = rng.randrange(24, min(len(raw), 3000))
        raw[place : place + 8] = rng.choice((2**64 - 1, 2**62, 2**33)).to_bytes(8, "little")
        how = f"a huge number at byte {place}"
    else:
        places = [rng.randrange(min(len(raw), 1500)) for _ in range(rng.choice((1, 1, 4)))]
        for place in places:
            raw[place] ^= 1 << rng.randrange(8)
        how = f"bits flipped at {places}"
    Path("bad.gguf").write_bytes(bytes(raw))

    def judge(code: int, _: str) -> str | None:
        seen = sipit.read_observation("out")
        return None if code == 0 and seen.seq_len == 3 else "no whole observation"

    argv = ["capture", "--ids", "5,6,7", "--layer", "1", "--out", "out", "--model", "bad.gguf"]
    return Plan(what=f"GGUF file, {how}", argv=argv, named="bad.gguf", judge=judge)


def _fit(rng: random.Random, scene: Scene) -> Plan:
    """Damage a fitted inverse in the cache: it orders candidates, so nothing may come of it but time."""
    shutil.copytree(scene.folder / "cache", "cache")
    file = next(Path("cache").rglob("block-2.safetensors"))
    raw = file.read_bytes()
    if rng.randrange(8) == 0:
        file.unlink()
        how = odd_in_place(rng, file)
    else:
        how, raw = rng.choice((damaged_bytes, damaged_header))(rng, raw)
        file.write_bytes(raw)
    argv = ["invert", str(scene.folder / "seen"), "--model", scene.model]
    return Plan(what=f"fit in the cache, {how}", argv=argv, named=None, judge=_recovers)


def _prefix(rng: random.Random, scene: Scene) -> Plan:
    record = {"format": "sipit.prefix", "observation": scene.seen.digest(), "input_ids": list(scene.input_ids[:3])}
    if rng.randrange(4) == 0:
        odd: list[Any] = [[], [-1], [10**30], [260], list(range(5000)), [True], {"a": 1}, "abc", [1.0], None]
        record["input_ids"] = rng.choice(odd)
        how, raw = f"ids {str(record['input_ids'])[:30]}", json.dumps(record).encode()
    else:
        how, raw = rng.choice((damaged_bytes, damaged_json, damaged_json))(rng, json.dumps(record).encode())
    Path("bad").write_bytes(raw)
    argv = ["invert", str(scene.folder / "seen"), "--no-fit", "--model", scene.model, "--resume", "bad"]
    return Plan(what=f"prefix file, {how}", argv=argv, named="bad", judge=_recovers)


def _text(rng: random.Random, scene: Scene) -> Plan:
    how, raw = rng.choice(
        [
            ("nothing", b""),
            ("random bytes", rng.randbytes(300)),
            ("a long line", b"x" * 3000),
            ("a longer line", b"y" * 6000),
            ("many lines", b"ab\n" * 300),
            ("empty lines", b"\n" * 300),
            ("NULs", bytes(50)),
            ("a byte order mark", b"\xef\xbb\xbfhi"),
            ("UTF-16", "some text".encode("utf-16")),
            ("a cut-off letter", "caf\u00e9".encode()[:-1]),
            ("an encoded surrogate", b"a\xed\xa0\x80b"),
            ("carriage returns", b"a\r\nb\r\n"),
        ]
    )
    Path("bad").write_bytes(raw)
    option = rng.choice(("--text-file", "--lines-file"))

    def judge(code: int, _: str) -> str | None:
        lines = [line for line in raw.split(b"\n") if line]
        read = read_observations("out") if option == "--lines-file" else [("", sipit.read_observation("out"))]
        lengths = [seen.seq_len for _, seen in read]
        expected = [len(line) for line in lines] if option == "--lines-file" else [len(raw)]
        return None if (code, lengths) == (0, expected) else f"states of {lengths[:5]} tokens"

    argv = ["capture", option, "bad", "--layer", "1", "--out", "out", "--model", scene.model]
    return Plan(what=f"{option}, {how}", argv=argv, named="bad" if raw else None, judge=judge)


def _folder(rng: random.Random, scene: Scene) -> Plan:
    """Put a broken file among good ones: the others are inverted all the same."""
    Path("d").mkdir()
    shutil.copy(scene.folder / "seen", "d/a.safetensors")
    path = Path("d") / rng.choice(("b.safetensors", "b\n.safetensors", "b\x1b[31m.safetensors"))
    if rng.randrange(3) == 0:
        how = odd_in_place(rng, path)
    else:
        how, raw = rng.choice((damaged_bytes, damaged_header))(rng, (scene.folder / "seen").read_bytes())
        path.write_bytes(raw)

    def judge(_: int, out: str) -> str | None:
        named = {line["file"]: line.get("text") for line in map(json.loads, out.splitlines())}
        return None if named.get("a.safetensors") == TEXT else "the good file beside a broken one was not inverted"

    return Plan(
        what=f"folder with {path.name!r}, {how}",
        argv=["invert", "d", "--model", scene.model, "--no-fit", "--any-model"],
        named=None,
        judge=judge,
    )


KINDS: tuple[Callable[[random.Random, Scene], Plan], ...] = (
    *(_observation, _observation, _observation_values, _observation_path, _certificate, _certificate, _log, _many),
    *(_model, _model, _model, _gguf, _gguf, _fit, _prefix, _text, _folder),
)


def malformed(number: int, scene: Scene, kinds: Sequence[Callable[[random.Random, Scene], Plan]] = KINDS) -> Case:
    """Run one case of some kinds in a new working folder."""
    rng = random.Random(number)
    with tempfile.TemporaryDirectory(dir=scene.folder) as name, _inside(name):
        plan = rng.choice(kinds)(rng, scene)
        os.environ["SIPIT_CACHE"] = str(Path("cache").absolute() if Path("cache").is_dir() else scene.folder / "none")
        outcome, fault = _outcome(plan)
        for path in Path().rglob("*"):  # so that the folder can be removed
            if path.is_file() and not path.is_symlink():
                path.chmod(0o600)
    return Case(number=number, what=f"{plan.what}; sipit {' '.join(plan.argv)[:200]!r}", outcome=outcome, fault=fault)


def _outcome(plan: Plan) -> tuple[str, str | None]:
    before, peak = _listing(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    try:
        with _limited(), warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            warnings.simplefilter("default")
            code = command_line(plan.argv)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  whatever it is, a panic of native code too, it is a fault
        return "crashed", f"{type(error).__name__}: {error}"[:300]
    out.flush()
    printed = out.buffer.getvalue().decode("utf-8", "surrogatepass")
    after = _listing()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    if growth > _GROWTH:
        return str(code), f"memory grew by {growth // 1024} MiB"
    if any(path.endswith(".partial") for path in after):
        return str(code), "an unfinished file was left behind"
    if code in (0, 1):
        try:
            return str(code), plan.judge(code, printed)
        except Exception as error:  # noqa: BLE001
            return str(code), f"its result cannot be judged: {type(error).__name__}: {error}"[:300]
    if code != 2:
        return str(code), f"exit code {code}"
    if after != before:
        return "2", f"refused, but wrote {sorted(set(after.items()) ^ set(before.items()))[:2]}"
    return "2", _wrong_sentence(plan, printed, err.getvalue())


def _wrong_sentence(plan: Plan, printed: str, said: str) -> str | None:
    """Return what is wrong with the words of a refusal."""
    lines = said.splitlines()
    if printed and not plan.may_print:
        return f"refused, but printed {printed[:60]!r}"
    last = lines[-1] if lines else ""
    if not last.startswith("sipit: ") or (len(lines) != 1 and not plan.may_print):
        return f"not one sentence: {said[:300]!r}"
    if len(last) > _SENTENCE:
        return f"a sentence of {len(last)} characters: {last[:150]!r}"
    if not last.isprintable():
        return f"a sentence that does not print: {last[:200]!r}"
    if plan.named is not None and plan.named not in last:
        return f"the sentence does not name {plan.named}: {last!r}"
    if not any(sign in last for sign in ("; ", "--help", "expected")):
        return f"the sentence names no way out: {last!r}"
    return None


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    old, cache = Path.cwd(), os.environ.get("SIPIT_CACHE")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(old)
        os.environ.pop("SIPIT_CACHE", None)
        if cache is not None:
            os.environ["SIPIT_CACHE"] = cache


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise _Hang in the body where it takes too long."""

    def stop(*_: object) -> None:
        raise _Hang(f"more than {_SECONDS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    faulthandler.dump_traceback_later(3 * _SECONDS, exit=True, file=2)  # native code hears no signal
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, old)


def _listing() -> dict[str, int]:
    return {str(p): p.lstat().st_mtime_ns for p in Path().rglob("*") if not p.is_dir() or p.is_symlink()}


def main() -> int:
    """Run many cases from the command line: the number of them, and the first (default 0)."""
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    n_cases = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    outcomes: Counter[str] = Counter()
    n_faults = 0
    with tempfile.TemporaryDirectory(prefix="sipit-") as name:
        scene = built_scene(Path(name))
        for number in range(first, first + n_cases):
            print(number, file=sys.stderr, end=" ", flush=True)  # names the case that kills the process
            case = malformed(number, scene)
            outcomes[case.outcome] += 1
            if case.fault is not None:
                n_faults += 1
                print(f"FAULT {case.number}: {case.fault}; {case.what}", flush=True)
    print(f"{n_cases} malformed inputs: {dict(outcomes)}, {n_faults} faults")
    return 1 if n_faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
