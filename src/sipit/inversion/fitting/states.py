"""States of many windows on disk, so that memory holds one batch: written once, resumed where it stopped."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sipit.inversion.fitting.sampling import written_on
from sipit.inversion.inverses.arithmetic import fast_arithmetic
from sipit.inversion.inverses.network import compact
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.storage import read_json, write_json

_BATCH = 8  # windows a pass
_SAVE_EVERY = 64  # windows between notes of progress, at least

OnStep = Callable[[int, int], None]  # done, total


class StatesFolder:
    """Windows of L tokens and their states at some cuts, in files that are filled in order.

    States lie there at unit root mean square, as float16: for each cut a file of (N, L, D). What was
    written before an interruption is kept.
    """

    def __init__(self, folder: Path, widths: dict[Cut, int], n_windows: int, length: int) -> None:
        self.paths = {cut: folder / f"states-{cut.site}-{cut.layer}.npy" for cut in widths}
        self.n_windows, self.length = n_windows, length
        self._note = folder / "states.json"
        self.done = self._saved = int(read_json(self._note)["done"]) if self._note.is_file() else 0
        mode: Literal["w+", "r+"] = "r+" if self.done else "w+"
        self._files = [
            np.lib.format.open_memmap(self.paths[cut], mode=mode, dtype=np.float16, shape=(n_windows, length, width))
            for cut, width in widths.items()
        ]
        self._windows = np.lib.format.open_memmap(
            folder / "windows.npy", mode=mode, dtype=np.int64, shape=(n_windows, length)
        )

    @property
    def windows(self) -> Tensor:
        """The token ids of all windows, once they are there. (N, L)."""
        return torch.from_numpy(np.array(self._windows))

    def append(self, windows: Tensor, states: Sequence[Tensor]) -> None:
        """Write the next windows (B, L) and their states at each cut, (B, L, D) each."""
        start, self.done = self.done, self.done + len(windows)
        self._windows[start : self.done] = windows.numpy()
        for file, at_cut in zip(self._files, states, strict=True):
            file[start : self.done] = at_cut.numpy()
        if self.done - self._saved >= _SAVE_EVERY or self.done == len(self._windows):
            for file in (self._windows, *self._files):
                file.flush()
                _release(file)
            write_json(self._note, {"done": self.done})
            self._saved = self.done


def sample_windows(
    lm: LanguageModel,
    starts: Sequence[Tensor],
    cuts: Sequence[Cut],
    folder: StatesFolder,
    *,
    seed: int,
    on_step: OnStep,
) -> int:
    """Let the model write on from some starts, (B, P) a batch; keep windows and states; return block-tokens."""
    length = folder.length
    n_before, total = 0, sum(len(start) for start in starts) * length
    for start in starts:
        if folder.done <= n_before:  # else it was written before an interruption
            generator = torch.Generator().manual_seed(seed * 1_000_003 + n_before)

            def tell(n_tokens: int, batch: int = len(start), before: int = n_before) -> None:
                on_step(before * length + batch * n_tokens, total)

            written = written_on(lm, start, length, generator, cuts=cuts, on_token=tell)
            folder.append(written.windows, written.states)
        n_before += len(start)
    return n_before * length * lm.n_layers


def capture_windows(
    lm: LanguageModel, windows: Tensor, cuts: Sequence[Cut], folder: StatesFolder, on_step: OnStep
) -> int:
    """Keep the windows (N, L), the last of a folder, and their states; return block-tokens.

    One pass over the windows serves every cut. Runs in bfloat16 where the machine is fast at it:
    a fit does not feel the difference.
    """
    tapped = lm.tapped(cuts)
    n_before = folder.n_windows - len(windows)
    with fast_arithmetic(lm.device, lm.dtype):
        while folder.done < folder.n_windows:
            batch = windows[folder.done - n_before :][:_BATCH]
            folder.append(batch, [compact(states) for states in tapped.states(batch)])
            on_step((folder.done - n_before) * folder.length, windows.numel())
    return windows.numel() * tapped.layer


class CapturedStates:
    """States of N windows of L tokens on disk, read a few at a time. Row r is position r % L of window r // L.

    They are read, not mapped: pages of a mapped file count as this process's memory, and batches in a
    random order would soon touch them all.
    """

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r")
        self.n_windows, self.length, self.width = mapped.shape
        self._offset = int(mapped.offset)
        self._file = path.open("rb", buffering=0)

    def around(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states before, at and after some rows, each of a position from 1 on. (B,) → (B, D) three times."""
        found = np.zeros((len(rows), 3, self.width), np.float16)
        n_bytes = self.width * found.itemsize
        for place, row in zip(found, rows.tolist(), strict=True):
            self._file.seek(self._offset + (row - 1) * n_bytes)
            self._file.readinto(memoryview(place).cast("B"))
        before, here, after = torch.from_numpy(found).float().unbind(dim=1)
        return before, here, after

    def __enter__(self) -> CapturedStates:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _release(file: np.memmap[Any, Any]) -> None:
    """Let go of the pages of a mapped file that was flushed."""
    mapping = file._mmap  # type: ignore[attr-defined]
    if hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED)
