"""What a packed pass costs on this machine, whatever it checks, in tokens: the price that a search weighs guesses by.

A pass over few tokens reads all weights, so one token costs nearly what twenty do.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from sipit.models.kept import kept
from sipit.observations import Cut

if TYPE_CHECKING:
    from sipit.models.language_model import LanguageModel

_BLOCKS = 4  # blocks that tell; all of a model's are alike
_FEW, _MANY = 4, 64  # tokens of the passes that are compared
_RUNS = 4  # of each, of which the quickest counts
_STEPS = (
    4.0,
    6.0,
    8.0,
    12.0,
    16.0,
    24.0,
    32.0,
    48.0,
    64.0,
)  # tokens; coarse, so that one machine searches alike each time


def tokens_a_pass(lm: LanguageModel) -> float:
    """Return how many tokens of a packed pass cost as much as the pass itself does, from 4 to 64.

    Measured once for a model, device and number of threads, and kept in the cache directory.
    """
    return lm.derived(
        ("tokens a pass", torch.get_num_threads()),
        lambda: kept(lm, "costs", "tokens a pass", lambda: _measured(lm), to_json=float, from_json=_known),
    )


def _known(value: Any) -> float | None:
    return value if value in _STEPS else None


def _measured(lm: LanguageModel) -> float:
    model = lm.cut(Cut(min(_BLOCKS, lm.n_layers)))
    seconds = {_FEW: float("inf"), _MANY: float("inf")}
    for _ in range(_RUNS):
        for n in seconds:
            n_tokens = min(n, lm.max_positions or n)
            ids = torch.arange(n_tokens) % lm.vocab_size
            started = time.perf_counter()
            model.row().extend(ids).sum().item()  # waits for a device
            seconds[n] = min(seconds[n], time.perf_counter() - started)
    token = max(seconds[_MANY] - seconds[_FEW], 0.0) / (_MANY - _FEW)
    price = (seconds[_FEW] - _FEW * token) / token if token else _STEPS[-1]
    return min(_STEPS, key=lambda step: max(step / max(price, 1e-9), price / step))
