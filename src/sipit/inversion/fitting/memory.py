"""Give memory back that was freed: the C library keeps it, and holes between what is in use add up to gigabytes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def release_free_memory() -> None:
    """Return freed memory to the operating system where the C library can (glibc); nothing elsewhere."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or a system whose programs cannot name their own
        return None
