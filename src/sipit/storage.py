"""Where files go and how they are written: the cache directory, whole-or-nothing writes.

Knows nothing of models or observations.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sipit.errors import StorageError

_DIGITS = 308  # of a whole number in JSON: every such number is within float64
_STALE_SECONDS = 24 * 3600  # an unfinished folder older than this belongs to a dead process


def cache_dir() -> Path:
    """Return the folder for converted models and fits: $SIPIT_CACHE, else the user's cache folder."""
    named = os.environ.get("SIPIT_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "sipit"


@contextlib.contextmanager
def whole_file(path: Path | str, *, is_private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place only if the body succeeds.

    A private file can be read by its owner alone, where the system has such modes.

    Raises:
        StorageError: the folder is missing, read-only or full; nothing is left behind.
    """
    target = Path(path)
    if "\0" in str(target):
        raise StorageError(f"cannot write {shown(target)}: no file's name holds a NUL; name another one")
    temporary = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    try:
        if target.exists() and not target.is_file():
            raise IsADirectoryError(21, "is a folder or a device, not a file")
        # An empty file first: libraries that write by name report a missing folder in their own words.
        temporary.touch(mode=_mode(is_private))
        yield temporary
        temporary.replace(target)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {shown(target)}: {_reason(error)}; name a file in a folder that exists, is writable and has "
            "room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_writable(path: Path | str) -> None:
    """Find out before long work, not after it, that a file cannot be written.

    Raises:
        StorageError: as `whole_file` would.
    """
    with contextlib.suppress(_ProbeOnlyError), whole_file(path):
        raise _ProbeOnlyError


@contextlib.contextmanager
def held_alone(path: Path | str, what: str) -> Iterator[None]:
    """Hold a lock file while the body runs, so that no other process does the same; it ends with the process.

    Where the system has no such locks (Windows), nothing is held.

    Raises:
        StorageError: another process holds it, or the file cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    target = Path(path)
    try:
        stream = target.open("ab")
    except OSError as error:
        raise StorageError(
            f"cannot write {shown(target)}: {_reason(error)}; choose a folder that is writable"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"{what} is under way in another process ({target}); wait until it has ended") from error
        yield


class _ProbeOnlyError(Exception):
    """Leaves `whole_file` without renaming."""


def _mode(is_private: bool) -> int:
    """Return the permissions of a new file, before the user's own mask is taken off."""
    return 0o600 if is_private else 0o666


def write_json(path: Path | str, record: object, *, is_private: bool = False) -> None:
    """Write `record` as UTF-8 JSON, whole or not at all."""
    text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False)
    with whole_file(path, is_private=is_private) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", newline="")


def read_json(path: Path | str) -> Any:
    """Read a UTF-8 JSON file.

    Raises:
        StorageError: the file is missing, unreadable, or no regular file.
        ValueError: it is not JSON, names a key twice, nests too deeply, or holds a number that no float64 can.
    """
    require_file(path)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {shown(path)}: {_reason(error)}; check the file's name") from error
    return _parsed(raw)


def parse_json(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: as `read_json`.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("lists or objects nest too deeply") from None


def require_file(path: Path | str) -> None:
    """Refuse what cannot be read as a file: a folder, a pipe, which would block, or nothing at all.

    Raises:
        StorageError: the path names no regular file.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {shown(path)}: {_reason(error)}; check the file's name") from error
    if not stat.S_ISREG(mode):
        raise StorageError(f"cannot read {shown(path)}: it is a folder, a pipe or a device; name a regular file")


@contextlib.contextmanager
def open_tensors(path: Path | str) -> Iterator[Any]:
    """Open a safetensors file; its tensors are read as they are asked for. The one place that does.

    Raises:
        StorageError: the path names no regular file: a pipe would block whoever opens it.
        SafetensorError: the file is no such file, or a damaged one.
    """
    from safetensors import safe_open

    require_file(path)
    with safe_open(path, framework="pt") as stream:
        yield stream


def _parsed(raw: bytes) -> Any:
    return parse_json(raw.decode("utf-8"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("an object names a key twice")
    return record


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits, more than {_DIGITS}")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


class LineLog:
    """A file of JSON records, one a line, that only grows; a line cut short by a crash is dropped.

    Opening changes nothing on disk: the first `append` creates the file, drops a cut-off last line, or
    ends a whole last line that lacks its newline. The file of a private log can be read by its owner alone.

    Raises:
        StorageError: the file cannot be written, or holds something else than JSON lines.
    """

    def __init__(self, path: Path | str, *, is_private: bool = False) -> None:
        self._path = Path(path)
        self._is_private = is_private
        try:
            raw = _held(self._path)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot write {shown(path)}: {_reason(error)}; name a writable file") from error
        whole, last = raw[: raw.rfind(b"\n") + 1], raw[raw.rfind(b"\n") + 1 :]
        self._cut_at: int | None = None  # where a cut-off last line starts, until it is dropped
        self._lacks_newline = False
        try:
            self._records = [_parsed(line) for line in whole.split(b"\n") if line]
            try:
                self._records += [_parsed(last)] if last else []
                self._lacks_newline = bool(last)
            except ValueError:
                if last[:2] not in (b"{", b'{"'):
                    raise
                self._cut_at = len(whole)
        except ValueError as error:
            raise StorageError(f"{shown(path)} is there and is not a file of JSON lines; name another file") from error
        if not all(isinstance(record, dict) for record in self._records):
            raise StorageError(f"{shown(path)} is there and is not a file of JSON records; name another file")

    def records(self) -> list[dict[str, Any]]:
        """Return what the file held when it was opened."""
        return self._records

    def append(self, record: object) -> None:
        """Write one record as a line, at once."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        start = "\n" if self._lacks_newline else ""
        try:
            self._path.touch(mode=_mode(self._is_private))
            if self._is_private and self._path.is_file():
                with contextlib.suppress(OSError):  # another's file, or a system without modes
                    self._path.chmod(0o600)
            with self._path.open("a", encoding="utf-8", newline="") as stream:
                if self._cut_at is not None:
                    stream.truncate(self._cut_at)
                    self._cut_at = None
                stream.write(start + line)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {_reason(error)}; free some room and go on") from error
        self._lacks_newline = False


def _held(path: Path) -> bytes:
    """Return what a file that can be written holds: nothing where it is absent or a device such as /dev/null."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "the folder is not writable") from None
        return b""
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        raise OSError(22, "it is a folder or a pipe, not a file")
    if not os.access(path, os.W_OK):
        raise PermissionError(13, "the file is not writable")
    return path.read_bytes() if stat.S_ISREG(mode) else b""


def build_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """Fill a new folder by `build(temporary)` and rename it to `target`; return `target`.

    Two processes may race: each builds its own temporary folder, the first rename wins and the
    other's work is dropped. An interrupted build leaves nothing at `target`.

    Raises:
        StorageError: the cache folder cannot be created or written, or is full.
    """
    if target.is_dir():
        return target
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        temporary.chmod(0o755)
        build(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # not a lost race
                raise
    except OSError as error:
        if isinstance(error, StorageError) or not _is_storage(error):
            raise
        raise StorageError(
            f"cannot fill the cache folder {target.parent}: {_reason(error)}; free some room, or "
            "name another folder in the environment variable SIPIT_CACHE"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove_stale(folder: Path) -> None:
    """Remove temporary folders that a process killed long ago left behind."""
    for left in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _is_storage(error: OSError) -> bool:
    return not isinstance(error, ConnectionError)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def shown(path: Path | str) -> str:
    """Return a path as text for a message: what cannot be printed is escaped, the middle of a long one left out."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:40]}…{text[-40:]}"
