"""What a packed check costs beside ordinary work: 256 candidates behind a prefix, a prefill of 256 tokens.

Both run 256 tokens through the same blocks of the same model, so their ratio says what the packing
itself costs. The two alternate in one process and medians are compared: a machine that slows down
midway slows both. Print the ratio in one line with

    python -m benchmarks.test_packed_check
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import sipit
from sipit import LanguageModel
from sipit.corpora import library_code
from sipit.observations import Cut

MODEL = "smollm2-135m"
LAYER = 15  # blocks run
N_PREFIX = 64  # tokens in the cache
N_CANDIDATES = 256  # of the packed pass, and tokens of the prefill
N_ROUNDS = 11
N_WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The two passes to compare."""

    packed: Callable[[], Tensor]
    prefill: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Medians over alternating rounds."""

    packed_seconds: float
    prefill_seconds: float
    n_rounds: int

    @property
    def ratio(self) -> float:
        """How many times the price of the prefill a packed pass of as many tokens costs."""
        return self.packed_seconds / self.prefill_seconds

    def line(self) -> str:
        """Return the comparison in one line."""
        return (
            f"packed/prefill {self.ratio:.3f}: {N_CANDIDATES} candidates behind {N_PREFIX} tokens "
            f"{self.packed_seconds:.3f} s, prefill of {N_CANDIDATES} tokens {self.prefill_seconds:.3f} s "
            f"({MODEL}, {LAYER} blocks, {torch.get_num_threads()} threads, medians of {self.n_rounds})"
        )


def sides(lm: LanguageModel) -> Sides:
    """Return both passes, with the prefix already in the cache."""
    cut = lm.cut(Cut(LAYER))
    ids = lm.encode(next(library_code(only=("textwrap",))))[: N_PREFIX + N_CANDIDATES]
    prefix, prompt = ids[:N_PREFIX], ids[:N_CANDIDATES]
    row = cut.row(prefix)
    candidates = torch.randperm(lm.vocab_size, generator=torch.Generator().manual_seed(0))[:N_CANDIDATES]
    places = torch.full_like(candidates, N_PREFIX)
    return Sides(
        packed=lambda: row.run(candidates, places),
        prefill=lambda: cut.ordinary(prompt),
    )


def measured(lm: LanguageModel, *, n_rounds: int = N_ROUNDS) -> Ratio:
    """Return the medians of both passes over alternating rounds."""
    both = sides(lm)
    packed, prefill = [], []
    for number in range(N_WARM_UP + n_rounds):
        times = _seconds(both.packed), _seconds(both.prefill)
        if number >= N_WARM_UP:
            packed.append(times[0])
            prefill.append(times[1])
    return Ratio(
        packed_seconds=statistics.median(packed),
        prefill_seconds=statistics.median(prefill),
        n_rounds=n_rounds,
    )


def _seconds(run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return sipit.load(MODEL, device="cpu")


def test_packed_pass_of_256_candidates(benchmark: BenchmarkFixture, lm: LanguageModel) -> None:
    found = measured(lm)
    benchmark.extra_info["packed_over_prefill"] = found.ratio
    benchmark.extra_info["prefill_seconds"] = found.prefill_seconds
    benchmark.extra_info["threads"] = torch.get_num_threads()
    states: Tensor = benchmark(sides(lm).packed)
    assert states.shape == (N_CANDIDATES, lm.d_model)


def test_prefill_of_256_tokens(benchmark: BenchmarkFixture, lm: LanguageModel) -> None:
    states: Tensor = benchmark(sides(lm).prefill)
    assert states.shape == (N_CANDIDATES, lm.d_model)


def main() -> None:
    """Print the ratio in one line."""
    print(measured(sipit.load(MODEL, device="cpu")).line())


if __name__ == "__main__":
    main()
