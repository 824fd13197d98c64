"""States of many windows on disk, so that memory holds one batch: written once, resumed where it stopped."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sipit.inversion.arithmetic import fast_arithmetic
from sipit.inversion.fitting.network import unit_rms
from sipit.inversion.fitting.windows import OnStep
from sipit.models import LanguageModel
from sipit.observations import Site
from sipit.storage import read_json, write_json

_BATCH = 8  # windows a pass
_SAVE_EVERY = 64  # windows between notes of progress

Cut = tuple[int, Site]


def capture_windows(
    lm: LanguageModel, windows: Tensor, cuts: Sequence[Cut], folder: Path, on_step: OnStep
) -> tuple[list[Path], int]:
    """Write the states of all windows at each cut, at unit root mean square, as float16.

    One pass over the windows serves every cut. Runs in bfloat16 where the machine is fast at it:
    a fit does not feel the difference. (N, L) → for each cut a file of (N, L, D), and block-tokens.
    """
    paths = [folder / f"states-{site}-{layer}.npy" for layer, site in cuts]
    note = folder / f"states-{'-'.join(f'{site}{layer}' for layer, site in cuts)}.json"
    n_windows, length = windows.shape
    done = int(read_json(note)["done"]) if note.is_file() else 0
    shapes = [(n_windows, length, lm.width(site)) for _, site in cuts]
    files = [_opened(path, shape, is_new=done == 0) for path, shape in zip(paths, shapes, strict=True)]
    tapped = lm.tapped(cuts)
    with fast_arithmetic(lm.device):
        for start in range(done, n_windows, _BATCH):
            batch = windows[start : start + _BATCH]
            for file, states in zip(files, tapped.states(batch), strict=True):
                width = states.shape[-1]
                unit = unit_rms(states.reshape(-1, width)).view(states.shape)
                file[start : start + len(batch)] = unit.half().cpu().numpy()
            done = start + len(batch)
            on_step(done * length, n_windows * length)
            if done % _SAVE_EVERY == 0 or done == n_windows:
                for file in files:
                    file.flush()
                    release(file)
                write_json(note, {"done": done})
    return paths, n_windows * length * tapped.layer


def release(file: np.memmap[Any, Any]) -> None:
    """Let go of the pages of a mapped file; they are read again when they are needed."""
    mapping = file._mmap  # type: ignore[attr-defined]
    if hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _opened(path: Path, shape: tuple[int, ...], *, is_new: bool) -> np.memmap[tuple[int, ...], np.dtype[np.float16]]:
    return np.lib.format.open_memmap(path, mode="w+" if is_new else "r+", dtype=np.float16, shape=shape)
