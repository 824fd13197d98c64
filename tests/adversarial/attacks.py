"""Seeded attacks on inversion: a mutated model, mutated states, and what the verdict must then not say.

One case is one number, which draws everything else. `python -m tests.adversarial.attacks 5000` runs many
and prints a line for each fault; the suite runs a few of the same.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sipit
from sipit import LanguageModel, SipitError
from sipit.inversion import Inversion, certificate_of, check_certificate
from sipit.inversion.evidence.result import MOST_RIVALS
from sipit.observations import DTYPES, Cut
from tests.tiny_models import FAMILIES, N_LAYERS, VOCAB, blocks_of, copy_of, embedding_rows, tiny_model

FIRST, SECOND, THIRD = 17, 93, 41  # tokens that a mutated model makes alike
_POLICIES = ("auto", "auto", "auto", "likely", "vocabulary", "random")
_ROUNDED = 2.0  # tolerances within which float64 arithmetic must put a claimed state


def suite_size(default: int) -> int:
    """Return how many cases to run: SIPIT_ATTACKS, else the suite's few."""
    return int(os.environ.get("SIPIT_ATTACKS", default))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attack, and what came of it."""

    number: int
    what: str  # the draws, for a person
    outcome: str  # a verdict, or "refused"
    fault: str | None  # why the outcome is wrong; None if it is not


def _alike(gap: float) -> Callable[[Any, random.Random], None]:
    def mutate(model: Any, rng: random.Random) -> None:
        rows = embedding_rows(model)
        for token_id in (SECOND, THIRD):
            direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(rng.randrange(99)))
            rows[token_id] = rows[FIRST] + gap * rows[FIRST].norm() * nn.functional.normalize(direction, dim=0)

    return mutate


def _shifted(share: float) -> Callable[[Any, random.Random], None]:
    def mutate(model: Any, _: random.Random) -> None:
        rows = embedding_rows(model)
        rows[SECOND] = rows[FIRST] + share * rows[FIRST].norm() / rows.shape[1] ** 0.5

    return mutate


def _huge(bias: float) -> Callable[[Any, random.Random], None]:
    def mutate(model: Any, rng: random.Random) -> None:
        _alike(3e-4)(model, rng)
        block = blocks_of(model)[rng.randrange(N_LAYERS)]
        last: Any = [part for part in block.modules() if type(part).__name__ in ("Linear", "Conv1D")][-1]
        if last.bias is None:
            last.bias = nn.Parameter(torch.zeros(32))
        if last.bias.shape[0] == 32:
            last.bias.data[rng.randrange(32)] += bias

    return mutate


def _scaled(model: Any, rng: random.Random) -> None:
    embedding_rows(model).mul_(rng.choice((1e-3, 10.0, 300.0)))


def _dead(model: Any, rng: random.Random) -> None:
    embedding_rows(model)[:, rng.randrange(32)] = 0.0


MODELS: dict[str, Callable[[Any, random.Random], None]] = {
    "as it is": lambda *_: None,
    "equal rows": _alike(0.0),
    "rows 1e-6 apart": _alike(1e-6),
    "rows 1e-4 apart": _alike(1e-4),
    "rows 1e-2 apart": _alike(1e-2),
    "rows a constant apart, 3e-4": _shifted(3e-4),
    "rows a constant apart, 0.1": _shifted(0.1),
    "a coordinate of 100": _huge(100.0),
    "a coordinate of 3,000": _huge(3000.0),
    "a scaled embedding": _scaled,
    "a dead coordinate": _dead,
}


def _noisy(rng: random.Random, lm: LanguageModel, cut: Cut, ids: Tensor, states: Tensor) -> Tensor:
    share = 10 ** rng.uniform(-7, 0)
    error = torch.randn(states.shape, generator=torch.Generator().manual_seed(rng.randrange(99)))
    length = states.float().norm(dim=1, keepdim=True) / states.shape[1] ** 0.5
    return torch.add(states, (share * length * error).to(states))


def _swapped(rng: random.Random, lm: LanguageModel, cut: Cut, ids: Tensor, states: Tensor) -> Tensor:
    order = list(range(len(states)))
    i, j = rng.randrange(len(order)), rng.randrange(len(order))
    order[i], order[j] = order[j], order[i]
    swapped: Tensor = states[order]
    return swapped


def _joined(rng: random.Random, lm: LanguageModel, cut: Cut, ids: Tensor, states: Tensor) -> Tensor:
    other = lm.capture(input_ids=ids.flip(0), layer=cut.layer, site=cut.site).states.to(states)
    k = rng.randrange(len(states))
    return torch.cat([states[:k], other[k:]])


def _other_layer(rng: random.Random, lm: LanguageModel, cut: Cut, ids: Tensor, states: Tensor) -> Tensor:
    layer = min(max(cut.layer + rng.choice((-1, 1)), 0), N_LAYERS)
    return lm.capture(input_ids=ids, layer=layer).states.to(states)


def _cut_off(rng: random.Random, lm: LanguageModel, cut: Cut, ids: Tensor, states: Tensor) -> Tensor:
    return states[rng.randrange(len(states)) :]


def _doubled(rng: random.Random, lm: LanguageModel, cut: Cut, ids: Tensor, states: Tensor) -> Tensor:
    k = rng.randrange(len(states))
    return torch.cat([states[: k + 1], states[k:]])


def _unit(rng: random.Random, lm: LanguageModel, cut: Cut, ids: Tensor, states: Tensor) -> Tensor:
    return nn.functional.normalize(states.float(), dim=1).to(states)


def _rounded_twice(rng: random.Random, lm: LanguageModel, cut: Cut, ids: Tensor, states: Tensor) -> Tensor:
    return states.bfloat16().to(states)


STATES: dict[str, Any] = {
    "as they are": None,
    "noisy": _noisy,
    "two rows swapped": _swapped,
    "joined with another prompt's": _joined,
    "of a layer beside": _other_layer,
    "without the first rows": _cut_off,
    "one row twice": _doubled,
    "of unit length": _unit,
    "rounded to bfloat16 in between": _rounded_twice,
}


def _prompt(rng: random.Random) -> Tensor:
    length = rng.choice((1, 2, 5, 9, 16, 24))
    kind = rng.randrange(4)
    if kind == 0:
        return torch.full((length,), rng.choice((FIRST, SECOND, rng.randrange(VOCAB))))
    pool = (FIRST, SECOND, THIRD, 5, 7) if kind == 1 else range(VOCAB)
    return torch.tensor([rng.choice(list(pool)) for _ in range(length)])


def attack(number: int) -> Case:
    """Run one case."""
    rng = random.Random(number)
    family = rng.choice(FAMILIES)
    of_model, of_states = rng.choice(list(MODELS)), rng.choice(["as they are"] * 6 + list(STATES))
    dtype = rng.choice(["float32"] * 5 + ["bfloat16", "float16", "float64"])
    stored = rng.choice([dtype, dtype, "float32", "bfloat16", "float16"])
    ids = _prompt(rng)
    cut = rng.choice([Cut(layer) for layer in range(N_LAYERS + 1)] + [Cut(N_LAYERS, "final")] * 2)
    policy, max_batch = rng.choice(_POLICIES), rng.choice((1, 7, 64, 256))
    what = (
        f"{family} with {of_model} in {dtype}, {cut}, states {of_states} in {stored}, policy {policy}, max_batch "
        f"{max_batch}, ids {ids.tolist()}"
    )
    try:
        model = tiny_model(family, seed=rng.randrange(3))
        MODELS[of_model](model, rng)
        lm = LanguageModel(model.to(DTYPES[dtype]), name=family)
        states = lm.capture(input_ids=ids, layer=cut.layer, site=cut.site, dtype=stored).states
        if STATES[of_states] is not None:
            states = STATES[of_states](rng, lm, cut, ids, states)
        found = sipit.invert(
            lm,
            states,
            layer=cut.layer,
            site=cut.site,
            policy=policy,  # type: ignore[arg-type]
            max_batch=max_batch,
            use_fit=False,
        )
        fault = _fault(lm, cut, ids if of_states == "as they are" else None, states, found)
        return Case(number=number, what=what, outcome=found.verdict, fault=fault)
    except SipitError as error:
        message = str(error)
        fault = None if len(message) < 700 else f"a message of {len(message)} characters"
        return Case(number=number, what=what, outcome="refused", fault=fault)
    except Exception as error:  # noqa: BLE001  whatever it is, it is a fault
        return Case(number=number, what=what, outcome="crashed", fault=f"{type(error).__name__}: {error}"[:300])


def _fault(lm: LanguageModel, cut: Cut, truth: Tensor | None, states: Tensor, found: Inversion) -> str | None:
    """Return what is wrong with a result. `truth` is None where the states are no prompt's own."""
    if truth is not None and found.verdict == "recovered" and found.input_ids != tuple(truth.tolist()):
        return f"recovered {found.input_ids}"
    if truth is not None and found.verdict == "ambiguous":
        for position, (token_id, p) in enumerate(zip(truth.tolist(), found.positions, strict=True)):
            is_full = len(p.rivals) >= MOST_RIVALS  # rounding hid every token: the nearest are named, and that it is so
            if not is_full and token_id not in {p.token_id, *(rival.token_id for rival in p.rivals)}:
                return f"ambiguous, {token_id} not named at position {position}"
    if found.verdict == "recovered" and (gap := _exact_gap(lm, cut, states, found)) > 1:
        return f"recovered, yet float64 arithmetic puts a state {gap:.2g} tolerances away"
    if found.verdict != "unmatched":
        seen = sipit.Observation(states=states, layer=cut.layer, site=cut.site)
        check = check_certificate(certificate_of(found), seen, lm)
        if not check.holds:
            return f"its certificate does not hold: {check.reasons[0]}"
    return None


def _exact_gap(lm: LanguageModel, cut: Cut, states: Tensor, found: Inversion) -> float:
    """Return how far the claimed states lie from the observed ones by another arithmetic, over what is allowed."""
    if lm.dtype not in (torch.float32, torch.float64) or lm.name == "mixtral":
        return 0.0  # coarse weights and routing make another arithmetic another model
    wide = LanguageModel(copy_of(lm.model).double(), name="wide")
    exact = wide.cut(cut).ordinary(torch.tensor(found.input_ids))  # (T, D)
    gaps = (exact - states.double()).norm(dim=1)
    allowed = torch.tensor([p.tolerance for p in found.positions], dtype=torch.float64)
    return float((gaps / (_ROUNDED * allowed + 1e-30)).max())


def main() -> int:
    """Run many cases from the command line: the number of them, and the first (default 0)."""
    torch.set_num_threads(1)
    n_cases = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    outcomes: Counter[str] = Counter()
    n_faults = 0
    for number in range(first, first + n_cases):
        case = attack(number)
        outcomes[case.outcome] += 1
        if case.fault is not None:
            n_faults += 1
            print(f"FAULT {case.number}: {case.fault}; {case.what}", flush=True)
    print(f"{n_cases} attacks: {dict(outcomes)}, {n_faults} faults")
    return 1 if n_faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
