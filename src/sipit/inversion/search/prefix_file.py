"""Keep the recovered prefix of a long search on disk, so that it can be gone on with.

The prefix is only a hint to the next search, which checks every token of it again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from sipit.errors import InputError
from sipit.inversion.search.options import Progress
from sipit.observations import Observation
from sipit.storage import read_json, write_json

_FORMAT = "sipit.prefix"
_SAVE_SECONDS = 10.0


class PrefixFile:
    """The prefix recovered so far, of one observation.

    Raises:
        InputError: the file is there and belongs to something else.
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path | str, seen: Observation) -> None:
        self._path = Path(path)
        self._observation = seen.digest()
        self._saved = time.monotonic()
        self.input_ids: tuple[int, ...] = ()
        if self._path.exists():
            self.input_ids = self._read()

    def update(self, progress: Progress) -> None:
        """Save now and then; an `on_progress` callback."""
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self.save(progress.input_ids)

    def save(self, input_ids: Sequence[int]) -> None:
        """Write the prefix, whole or not at all."""
        self._saved = time.monotonic()
        if len(input_ids):
            record = {"format": _FORMAT, "observation": self._observation, "input_ids": list(input_ids)}
            write_json(self._path, record, is_private=True)

    def remove(self) -> None:
        """Remove the file: the search is done."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> tuple[int, ...]:
        try:
            record = read_json(self._path)
            if record["format"] != _FORMAT:
                raise ValueError("another format")
            ids = tuple(record["input_ids"])
            if not all(type(i) is int for i in ids):
                raise ValueError("ids that are not whole numbers")
            is_ours = record["observation"] == self._observation
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path} does not hold a recovered prefix ({error}); name another file") from error
        if not is_ours:
            raise InputError(f"{self._path} holds the prefix of another observation; name another file")
        return ids
