"""Local text and code: a UTF-8 file, or the files below a folder, in pieces of bounded size."""

from __future__ import annotations

import contextlib
import os
import random
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path

from sipit.errors import InputError, StorageError

PIECE = 1 << 16  # characters


class LocalTexts(Iterator[str]):
    """Iterate over the texts of a file or folder in an order drawn from the seed, file by file.

    Every file gives its first piece before any gives its second, so that the start of the stream is
    as varied as the folder. Line ends stay as they are. Files that are not UTF-8 text are skipped and
    counted; names that begin with a dot are not looked at.

    Args:
        path: a file, or a folder to walk.
        seed: of the order.
        suffixes: endings to take in a folder, such as (".py", ".md"); empty for all.

    Raises:
        StorageError: the path, or something below it, is missing or cannot be read.
        InputError: the file named is not UTF-8 text, or the folder holds no file to read.
    """

    def __init__(self, path: Path | str, *, seed: int, suffixes: Collection[str] = ()) -> None:
        self.n_files = 0  # text files begun
        self.n_skipped = 0  # files that are not text
        endings = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
        root = Path(path).expanduser()
        with _readable(root):
            is_folder = root.is_dir()
            paths = _files_below(root, endings) if is_folder else [root]
            if not is_folder and not _is_text(root):
                raise InputError(f"{root} is not a file of UTF-8 text; convert it, or name another")
        if not paths:
            ending = f" that ends in {' or '.join(endings)}" if endings else ""
            raise InputError(f"{root} holds no file{ending}; name another folder or other suffixes")
        random.Random(seed).shuffle(paths)
        self._texts = self._in_rounds(paths)

    def __next__(self) -> str:
        return next(self._texts)

    def _in_rounds(self, paths: list[Path]) -> Iterator[str]:
        waiting = deque((path, 0) for path in paths)
        while waiting:
            path, start = waiting.popleft()
            with _readable(path):
                if start == 0:
                    is_text = _is_text(path)
                    self.n_files += is_text
                    self.n_skipped += not is_text
                    if not is_text:
                        continue
                piece, end = _piece(path, start)
            if len(piece) == PIECE:
                waiting.append((path, end))
            if start == 0:
                piece = piece.removeprefix("\ufeff")  # byte order mark
            if piece:
                yield piece


def _files_below(root: Path, endings: tuple[str, ...]) -> list[Path]:
    """Return the files below a folder in an order that every machine shares."""

    def fail(error: OSError) -> None:  # os.walk would pass over a folder that cannot be listed
        raise error

    found = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and (not endings or name.endswith(endings)):
                found.append(Path(folder, name))
    return sorted(found)


def _is_text(path: Path) -> bool:
    """Read a file through once: a long one must not turn out undecodable when half of it is used."""
    if not path.is_file() and path.exists():
        return False  # a pipe or a device; never opened
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            while piece := stream.read(PIECE):
                if "\0" in piece:
                    return False
    except UnicodeDecodeError:
        return False
    return True


def _piece(path: Path, start: int) -> tuple[str, int]:
    with path.open(encoding="utf-8", newline="") as stream:
        stream.seek(start)
        return stream.read(PIECE), stream.tell()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        at = error.filename or path
        raise StorageError(f"cannot read {at}: {error.strerror or error}; check its name and permissions") from error
