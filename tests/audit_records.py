"""A small record of an audit, for tests of its page."""

from __future__ import annotations

from typing import Any

CELL: dict[str, Any] = {
    "layer": 5,
    "site": "block",
    "dtype": "float32",
    "stored_as": "float32",
    "defence": "none",
    "strength": 0.0,
    "prompts": 4,
    "exact_prompts": 4,
    "tokens": 80,
    "exact_tokens": 80,
    "low": 0.51,
    "high": 1.0,
    "wall_ratio": 3.5,
    "kl": 0.0,
    "agreement": 1.0,
    "seconds": 0.2,
    "verdicts": {"recovered": 4},
}
NOISY = {**CELL, "defence": "gaussian", "strength": 0.5, "exact_prompts": 0, "exact_tokens": 40, "agreement": 0.7}
HIDDEN = {**NOISY, "strength": 4.0, "exact_tokens": 1, "agreement": 0.1}
RECORD: dict[str, Any] = {
    "model": "tiny <b>",
    "fingerprint": "sha256:0123",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "sipit": "0",
    "torch": "2",
    "command": "sipit audit --text '<x>'",
    "cells": [CELL, NOISY, HIDDEN],
}
TRIAL: dict[str, Any] = {
    "cell": "5 block float32 none:0",
    "prompt": 0,
    "verdict": "recovered",
    "tokens": 2,
    "exact_tokens": 1,
    "shown": [
        {"token": "<script>secret", "is_right": True, "distance": 0.1, "runner_up": 2.0, "posterior": None},
        {"token": None, "is_right": False, "distance": 0.2, "runner_up": None, "posterior": 0.5},
    ],
}
