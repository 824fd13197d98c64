"""What every record of a measurement begins with: versions, model, machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from sipit import __version__
from sipit.models import LanguageModel
from sipit.models.quantized import quantizer_of


def record_head(lm: LanguageModel) -> dict[str, Any]:
    """Return the versions, the model with its fingerprint, and where it ran, as JSON values."""
    return {
        "sipit": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def dated_head(lm: LanguageModel) -> dict[str, Any]:
    """Return the same with the model's quantiser and the day, in UTC."""
    made = time.strftime("%Y-%m-%d", time.gmtime())
    return {**record_head(lm), "quantize": quantizer_of(lm.model), "made": made}
