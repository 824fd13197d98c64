"""The digest of a record."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest_of(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a record in canonical JSON. It detects edits by accident, not forgery."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A record from a file may hold half a surrogate pair somewhere, which is no text but has a digest all the same.
    return f"sha256:{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"
