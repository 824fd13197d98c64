"""The digest of a record."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest_of(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a record in canonical JSON. It detects edits by accident, not forgery."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
