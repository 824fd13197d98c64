"""Peak memory of an inversion above the loaded model, in a process of its own. Linux only.

    python -m benchmarks.peak_memory --tokens 64 512

Each prompt length gets a fresh process: load the model, read every weight once (they are mapped
from disk and would otherwise be counted when first used), reset the kernel's high-water mark, invert,
and read the mark again. Calibration and whatever the proposal prepares count; the observation is
read from a file, so that computing it does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import sipit
from sipit.corpora import library_code

MODEL = "smollm2-135m"
LAYER = 15  # blocks run
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what the kernel takes as "forget the high-water mark"


def megabytes(key: str) -> float:
    """Return resident memory of this process in 10^6 bytes: "VmRSS" now, "VmHWM" at its peak."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


def measure(observation: Path, *, use_fit: bool) -> str:
    """Invert one observation in this process and return its peak in one line."""
    from sipit.inversion.inverses.store import load_fit

    lm = sipit.load(MODEL, device="cpu")
    _ = lm.fingerprint  # reads every weight
    seen = sipit.read_observation(observation)
    source = "fit" if use_fit and load_fit(lm, seen.cut) is not None else "anchors"
    _CLEAR.write_text(_RESET_PEAK)
    before = megabytes("VmRSS")
    found = sipit.invert(lm, seen, use_fit=use_fit)
    peak = megabytes("VmHWM")
    return (
        f"{seen.seq_len} tokens, layer {seen.layer} of {MODEL}, {source}: {found.verdict}, "
        f"peak {peak - before:.0f} MB above the loaded model ({before:.0f} MB)"
    )


def write_prompt(path: Path, *, n_tokens: int, layer: int) -> None:
    """Capture the first tokens of a module of the standard library."""
    lm = sipit.load(MODEL, device="cpu")
    ids = lm.encode(next(library_code(only=("textwrap",))))
    if len(ids) < n_tokens:
        raise SystemExit(f"the text gives {len(ids)} tokens, too few for {n_tokens}; pass fewer")
    sipit.write_observation(lm.capture(input_ids=ids[:n_tokens], layer=layer), path)


def main() -> None:
    """Print one line for each prompt length."""
    parser = argparse.ArgumentParser(description="Peak memory of an inversion above the loaded model.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], metavar="N", help="prompt lengths")
    parser.add_argument("--layer", type=int, default=LAYER)
    parser.add_argument("--fit", action="store_true", help="use a fitted inverse if one is in the cache directory")
    parser.add_argument("--observation", type=Path, help=argparse.SUPPRESS)  # set for the child process
    options = parser.parse_args()
    if not _CLEAR.exists():
        raise SystemExit("peak memory is read from /proc, which this machine lacks; run on Linux")
    if options.observation is not None:
        print(measure(options.observation, use_fit=options.fit))
        return
    with tempfile.TemporaryDirectory() as folder:
        for n_tokens in options.tokens:
            path = Path(folder) / f"{n_tokens}.safetensors"
            write_prompt(path, n_tokens=n_tokens, layer=options.layer)
            flags = ["--fit"] if options.fit else []
            child = [sys.executable, "-m", "benchmarks.peak_memory", "--observation", str(path), *flags]
            subprocess.run(child, check=True)


if __name__ == "__main__":
    main()
