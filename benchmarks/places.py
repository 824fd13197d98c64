"""identify and verify by the numbers: rows of every kind of place, rows of none, planted faults and good rows.

python -m benchmarks.places [--identify 200] [--none 100] [--faults 100] [--good 500] [--real]

Tiny random models of several families; --real adds SmolLM2-135M for a tenth of each. Exit code 1 on any mistake.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch
from tests.tiny_models import tiny_model
from torch import Tensor

import sipit
from sipit import LanguageModel, Observation
from sipit.inversion.places import identify, verify
from sipit.models.sites import SITES
from sipit.observations import Cut

FAMILIES = ("llama", "gpt2", "gemma3_text", "qwen3", "olmo2", "phi3")


def _cut(rng: random.Random, lm: LanguageModel) -> Cut:
    site = rng.choice(list(SITES))
    spec = SITES[site]
    return Cut(rng.randint(spec.first_layer(lm.n_layers), spec.last_layer(lm.n_layers)), site)


def _ids(rng: random.Random, lm: LanguageModel, n: int) -> Tensor:
    return torch.tensor([rng.randrange(lm.vocab_size) for _ in range(n)])


def _is_right(lm: LanguageModel, ids: Tensor, cut: Cut, scale: float, offset: int, rows: Tensor) -> bool:
    """Whether a place is among those found, or one with the very same rows is."""
    for fit in identify(lm, rows).fits:
        there = lm.capture(input_ids=ids, layer=fit.layer, site=fit.site).states * fit.scale  # type: ignore[arg-type]
        here = rows[fit.offset :]
        close = float((there - here).norm() / here.norm()) < 1e-2
        if fit.offset == offset and close and (fit.site != cut.site or abs(fit.scale / scale - 1) < 5e-3):
            return True
    print(f"identify: missed {lm.name} {cut} scale {scale} offset {offset}")
    return False


def _something_else(rng: random.Random, lm: LanguageModel, other: LanguageModel) -> Tensor:
    rows = lm.capture(input_ids=_ids(rng, lm, 9), layer=rng.randint(1, lm.n_layers)).states
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    kinds = (
        lambda: rows[rng.randint(1, 4) :],
        lambda: torch.randn(rows.shape, generator=generator) * rows.std(),
        lambda: rows[:, torch.randperm(rows.shape[1], generator=generator)],
        lambda: torch.cat([rows[:1], rows[1:].flip(0)]),
        lambda: -rows,
        lambda: rows + torch.randn(rows.shape, generator=generator) * rows.std() * 0.3,
        lambda: other.capture(input_ids=_ids(rng, other, 9), layer=2).states,
    )
    return rng.choice(kinds)()


def _planted(rng: random.Random, lm: LanguageModel, ids: Tensor, rows: Tensor, row: int, layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    near = [at for at in (layer - 1, layer + 1) if 0 <= at <= lm.n_layers]
    own = rows[row]
    kinds = (
        lambda: lm.capture(input_ids=ids, layer=rng.choice(near)).states[row],
        lambda: lm.capture(input_ids=ids, site="final").states[row],
        lambda: rows[row - 1],
        lambda: lm.capture(input_ids=_ids(rng, lm, len(ids)), layer=layer).states[row],
        lambda: own * rng.choice([0.5, 1.01, 3.0]),
        lambda: own * 0,
        lambda: own + torch.randn(own.shape, generator=generator) * own.norm() * rng.choice([1e-3, 1e-2]),
        lambda: own[torch.randperm(len(own), generator=generator)],
        lambda: own / own.norm() * 0.9,
        lambda: own - lm.capture(input_ids=ids, layer=max(0, layer - 1)).states[row],
    )
    return rng.choice(kinds)()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("identify", 200), ("none", 100), ("faults", 100), ("good", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    tiny = [LanguageModel(tiny_model(family), name=family) for family in FAMILIES]
    other = LanguageModel(tiny_model("llama", seed=1))
    real = [sipit.load("smollm2-135m")] if options.real else []
    rng = random.Random(0)

    def model(number: int) -> LanguageModel:
        return real[0] if real and number % 10 == 0 else rng.choice(tiny)

    right = 0
    for number in range(options.identify):
        lm = model(number)
        cut, scale, offset = _cut(rng, lm), rng.choice([1.0, 1.0, 0.25, 1.7, 30.0]), rng.choice([0, 0, 2])
        scale = 1.0 if cut.site == "log_probs" or cut.site.endswith("unit") else scale
        ids = _ids(rng, lm, 9)
        rows = lm.capture(input_ids=ids, layer=cut.layer, site=cut.site).states * scale
        rows = torch.cat([torch.zeros(offset, rows.shape[1]), rows])
        right += _is_right(lm, ids, cut, scale, offset, rows)
    none = 0
    for number in range(options.none):
        lm = model(number)
        found = identify(lm, _something_else(rng, lm, other), is_thorough=not real or number % 10 != 0)
        none += not found.fits
    found_faults = blamed = 0
    for number in range(options.faults):
        lm = model(number)
        ids, layer, row = _ids(rng, lm, 9), rng.randint(1, lm.n_layers), rng.randint(1, 8)
        rows = lm.capture(input_ids=ids, layer=layer).states.clone()
        rows[row] = _planted(rng, lm, ids, rows, row, layer)
        bad = [each.row for each in verify(lm, Observation(states=rows, layer=layer), ids).bad_rows]
        found_faults += row in bad
        blamed += len(set(bad) - {row})
    for number in range(-(-options.good // 10)):
        lm = model(number)
        ids, cut, dtype = _ids(rng, lm, 10), _cut(rng, lm), rng.choice(["float32", "bfloat16", "float16"])
        blamed += len(verify(lm, lm.capture(input_ids=ids, layer=cut.layer, site=cut.site, dtype=dtype), ids).bad_rows)
    print(f"identify: right on {right} of {options.identify}, none on {none} of {options.none}")
    print(f"verify: found {found_faults} of {options.faults} faults, blamed {blamed} good rows")
    wrong = options.identify - right + options.none - none + options.faults - found_faults + blamed
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
