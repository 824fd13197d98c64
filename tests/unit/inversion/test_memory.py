"""Freed memory goes back to the system, on a C library that can; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from sipit.inversion.fitting import memory


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc only")
def test_freed_blocks_between_blocks_in_use_go_back() -> None:
    blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]  # too small to be mapped on their own
    del blocks[:-1:2], blocks[:-1:2]
    before = _resident_bytes()
    memory.release_free_memory()
    assert before - _resident_bytes() > 50_000_000


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    try:
        memory.release_free_memory()
        assert memory._trim() is None
    finally:
        memory._trim.cache_clear()
