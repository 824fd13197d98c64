"""Recover the exact prompt from a causal language model's hidden states, with evidence.

    lm = sipit.load("smollm2-135m")
    seen = lm.capture("A prompt.", layer=15)
    found = sipit.invert(lm, seen)

Names load on first use, so that `sipit --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sipit.errors import SipitError as SipitError
    from sipit.inversion import Inversion as Inversion
    from sipit.inversion import check_certificate as check_certificate
    from sipit.inversion import invert as invert
    from sipit.inversion import invert_last as invert_last
    from sipit.models import LanguageModel as LanguageModel
    from sipit.models import load as load
    from sipit.observations import Observation as Observation
    from sipit.observations import read_observation as read_observation
    from sipit.observations import write_observation as write_observation

__version__ = "0.1.0"

_HOMES = {
    "Inversion": "sipit.inversion",
    "LanguageModel": "sipit.models",
    "Observation": "sipit.observations",
    "SipitError": "sipit.errors",
    "check_certificate": "sipit.inversion",
    "invert": "sipit.inversion",
    "invert_last": "sipit.inversion",
    "load": "sipit.models",
    "read_observation": "sipit.observations",
    "write_observation": "sipit.observations",
}

__all__ = [
    "Inversion",
    "LanguageModel",
    "Observation",
    "SipitError",
    "check_certificate",
    "invert",
    "invert_last",
    "load",
    "read_observation",
    "write_observation",
]


_PACKAGES = ("collisions", "corpora")  # reached as sipit.collisions.… without an import of their own


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"sipit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'sipit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
