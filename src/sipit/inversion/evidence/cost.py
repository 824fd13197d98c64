"""What an inversion cost, in the keys of its record."""

from __future__ import annotations

from typing import Any

from sipit.inversion.evidence.result import Inversion
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise import noise_floor
from sipit.models import LanguageModel
from sipit.models.plain_pass import plain_seconds
from sipit.observations import Observation


def charge(meter: Meter, found: Inversion) -> None:
    """Charge a meter for a whole search that was part of a larger one."""
    meter.add(block_tokens=found.block_tokens, n_checked=found.n_checked, n_passes=found.n_passes)


def cost_of(lm: LanguageModel, seen: Observation, meter: Meter, seconds: float) -> dict[str, Any]:
    """Return the fields of an `Inversion` that say its cost; the plain pass is timed once per cut and length."""
    return {
        "seconds": seconds,
        "wall_ratio": seconds / max(plain_seconds(lm, seen.cut, seen.n_positions), 1e-9),
        "n_passes": meter.n_passes,
        "block_tokens": meter.block_tokens,
        "prefill_ratio": meter.block_tokens / (seen.n_positions * max(seen.layer, 1)),
        "calibration_block_tokens": noise_floor(lm, seen.cut, seen.n_positions).block_tokens,
        "n_checked": meter.n_checked,
    }
