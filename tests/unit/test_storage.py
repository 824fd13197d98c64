"""Files and folders appear whole or not at all, whoever else writes at the same time."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sipit import storage
from sipit.errors import FetchError, StorageError
from sipit.storage import (
    LineLog,
    build_folder,
    cache_dir,
    held_alone,
    open_tensors,
    read_json,
    require_writable,
    sha256_of,
    whole_file,
    write_json,
)

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["a\0b", "n" * 5000])
def test_name_that_no_file_can_have_is_a_short_sentence(name: str, tmp_path: Path) -> None:
    for path in (tmp_path / name, tmp_path / "missing" / name):
        with pytest.raises(StorageError) as raised:
            require_writable(path)
        assert str(raised.value).startswith("cannot write ")
        assert len(str(raised.value)) < 400


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIPIT_CACHE", str(tmp_path / "named"))
    assert cache_dir() == tmp_path / "named"
    monkeypatch.delenv("SIPIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "sipit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "sipit"


def _write_half(path: Path, error: Exception) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise error


def test_file_is_replaced_only_when_the_body_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        _write_half(path, RuntimeError())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(StorageError, match="No space left"):
        _write_half(path, FULL)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_path_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent" / "x", tmp_path, tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="cannot write"):
            require_writable(path)
    for path in (Path(), Path(".."), Path("/")):
        with pytest.raises(StorageError, match="cannot write"):
            require_writable(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_probing_a_path_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    require_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("kept")
    require_writable(path)
    assert path.read_text() == "kept"


def test_special_file_is_not_replaced_by_a_plain_one(tmp_path: Path) -> None:
    """A device or a pipe, such as the null device, must never be renamed over."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StorageError):
        write_json(pipe, {})
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_pipe_is_refused_where_tensors_are_read_and_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="a pipe"), open_tensors(tmp_path / "pipe"):
        pass


def test_tensors_are_opened_in_one_place_alone() -> None:
    source = Path(storage.__file__).parent
    opening = {path.name for path in source.rglob("*.py") if "safe_open(" in path.read_text("utf-8")}
    assert opening == {"storage.py"}


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    failures: list[BaseException] = []

    def write(text: str) -> None:
        try:
            with whole_file(tmp_path / "file") as temporary:
                temporary.write_text(text)
                barrier.wait(20)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (tmp_path / "file").read_text() in ("one", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=8,
)


@given(record=JSON)
def test_json_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, record: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "record.json"
    write_json(path, record)
    assert read_json(path) == record


def test_nan_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_unreadable_json_is_a_storage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(StorageError, match="cannot read"):
            read_json(path)


def test_sha256_equals_the_library_over_many_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * (3 * 4096 + 1)  # more than three blocks, and a remainder
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_built_folder_holds_what_was_built_and_is_built_once(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "models" / "name"
    assert build_folder(target, lambda folder: _write(folder, "first")) == target
    assert build_folder(target, lambda folder: _write(folder, "second")) == target
    assert (target / "text").read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


def _write(folder: Path, text: str) -> None:
    (folder / "text").write_text(text)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), FetchError("x"), MemoryError()])
def test_interrupted_build_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def build(folder: Path) -> None:
        _write(folder, "half")
        raise error

    with pytest.raises(type(error)):
        build_folder(tmp_path / "name", build)
    assert list(tmp_path.iterdir()) == []


def test_full_cache_is_a_storage_error_that_names_the_way_out(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        _write(folder, "half")
        raise FULL

    with pytest.raises(StorageError, match=r"No space left.*SIPIT_CACHE"):
        build_folder(tmp_path / "name", build)
    assert list(tmp_path.iterdir()) == []


def test_file_where_the_cache_folder_should_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="SIPIT_CACHE"):
        build_folder(tmp_path / "cache" / "models" / "name", lambda folder: _write(folder, "x"))


def test_file_at_the_target_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "name").write_text("a file")
    with pytest.raises(StorageError):
        build_folder(tmp_path / "name", lambda folder: _write(folder, "x"))
    assert (tmp_path / "name").read_text() == "a file"
    assert [p.name for p in tmp_path.iterdir()] == ["name"]


def test_remains_of_a_dead_process_are_removed_and_those_of_a_live_one_kept(tmp_path: Path) -> None:
    for name, age in ((".name.dead.partial", 48 * 3600), (".name.live.partial", 60)):
        (tmp_path / name).mkdir()
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    build_folder(tmp_path / "name", lambda folder: _write(folder, "x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".name.live.partial", "name"]


def _race(target: Path, text: str, barrier: Any, results: Any) -> None:
    def build(folder: Path) -> None:
        _write(folder, text)
        barrier.wait(30)  # neither renames before both have built

    results.put((text, str(build_folder(target, build)), (target / "text").read_text()))


def test_two_processes_that_race_leave_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    target = tmp_path / "name"
    processes = [context.Process(target=_race, args=(target, text, barrier, results)) for text in ("one", "two")]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {text for text, _, _ in outcomes} == {"one", "two"}
    assert {path for _, path, _ in outcomes} == {str(target)}
    assert len({content for _, _, content in outcomes}) == 1
    assert list(tmp_path.iterdir()) == [target]
    assert json.dumps((target / "text").read_text()) in ('"one"', '"two"')


def test_what_is_held_alone_is_refused_to_another_process_and_given_back(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = "import sys; from sipit.storage import held_alone\nwith held_alone(sys.argv[1], 'a fit'): print('held')"

    def elsewhere() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, str(lock)], capture_output=True, text=True, check=False)

    with held_alone(lock, "a fit"):
        refused = elsewhere()
    assert refused.returncode != 0
    assert "a fit is under way in another process" in refused.stderr
    assert elsewhere().stdout == "held\n"


def test_lock_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="writable"), held_alone(tmp_path / "no" / "lock", "a fit"):
        pass


@pytest.mark.parametrize("held", [b'{"mine": 1}', b'{"a": 1}\n{"b": 2', b'{"a": 1}\n{"b": 2}', b'{"b', b"{", b""])
def test_opening_a_log_changes_nothing(tmp_path: Path, held: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(held)
    LineLog(path)
    assert path.read_bytes() == held


def test_opening_an_absent_log_creates_nothing(tmp_path: Path) -> None:
    assert LineLog(tmp_path / "log").records() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("held", "kept", "records"),
    [
        (b'{"mine": 1}', b'{"mine": 1}\n', [{"mine": 1}]),
        (b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1}\n{"b": "\xc3', b'{"a": 1}\n', [{"a": 1}]),
        (b'{"b": ', b"", []),
        (b"", b"", []),
    ],
)
def test_append_keeps_whole_lines_and_drops_a_cut_off_one(
    tmp_path: Path, held: bytes, kept: bytes, records: list[dict[str, int]]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(held)
    log = LineLog(path)
    assert log.records() == records
    log.append({"c": 3})
    log.append({"d": 4})
    assert path.read_bytes() == kept + b'{"c": 3}\n{"d": 4}\n'


@pytest.mark.parametrize(
    "held", [b"text", b"[1]\n", b"[1]", b'[1]\n{"a', b'{\n "a": 1\n}', b"1\n", b"\xff\n", b"[" * 10**5]
)
def test_a_log_of_something_else_is_refused_and_kept(tmp_path: Path, held: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(held)
    with pytest.raises(StorageError, match="is not a file of JSON"):
        LineLog(path)
    assert path.read_bytes() == held


def test_a_log_that_cannot_be_written_is_refused_when_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    names = ("absent/log", "pipe", "n" * 300, "a\0b")
    for path in (tmp_path, *(tmp_path / name for name in names)):
        with pytest.raises(StorageError, match="cannot write"):
            LineLog(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}', "[" * 10**5 + "]" * 10**5, "1" * 5000, "1" * 400, "[NaN]", "[-Infinity]", "1e400",
    ],
)  # fmt: skip
def test_json_that_cannot_be_trusted_is_a_value_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "x.json")


def test_a_path_that_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "n" * 300, "a\0b", "."):
        with pytest.raises(StorageError, match="cannot read"):
            read_json(tmp_path / name)
