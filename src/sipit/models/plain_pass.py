"""What an ordinary forward pass costs here and now: the price that an inversion is compared with."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import torch

from sipit.observations import Cut

if TYPE_CHECKING:
    from sipit.models.language_model import LanguageModel

_RUNS = 5  # of which the median counts
_LONG = 0.25  # seconds that a pass takes from which one run tells enough
_PRIME = 7919  # tokens this far apart by id are of all kinds


def plain_seconds(lm: LanguageModel, cut: Cut, n_tokens: int) -> float:
    """Return the seconds of an ordinary forward pass of a prompt through the blocks before a cut.

    Measured in this process and on its threads, once for lengths within a factor of two; between those it is
    taken to grow with the length.
    """
    key = ("plain seconds", cut, n_tokens.bit_length(), torch.get_num_threads())
    return n_tokens * lm.derived(key, lambda: _seconds(lm, cut, n_tokens) / n_tokens)


def _seconds(lm: LanguageModel, cut: Cut, n_tokens: int) -> float:
    model = lm.cut(cut, seq_len=n_tokens)
    ids = torch.arange(n_tokens) * _PRIME % lm.vocab_size
    taken: list[float] = []
    while len(taken) < _RUNS and (not taken or taken[-1] < _LONG):
        started = time.perf_counter()
        model.ordinary(ids).sum().item()  # waits for a device to be done
        taken.append(time.perf_counter() - started)
    return median(taken)
