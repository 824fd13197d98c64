"""Seeded forged certificates, and what a replay must then not say.

One case is one number, which draws everything else. `python -m tests.adversarial.forgeries 1000` runs many
and prints a line for each fault; the suite runs a few of the same.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

import sipit
from sipit import LanguageModel, Observation, SipitError
from sipit.inversion import certificate_of, check_certificate
from tests.adversarial.damage import damaged_json
from tests.tiny_models import N_LAYERS, VOCAB, copy_of, twin_model

_FAMILIES = ("gpt2", "llama", "gemma3_text", "gpt_neox", "qwen3")
FIRST, SECOND = 17, 93  # tokens with equal rows
_CLEARLY = 4.0  # times beyond a bound, or within it, from which float64 arithmetic decides


@dataclass(frozen=True, kw_only=True)
class Case:
    """One forgery, and what came of it."""

    number: int
    what: str
    outcome: str  # "holds", "does not hold" or "refused"
    fault: str | None


def forgery(number: int) -> Case:
    """Run one case."""
    rng = random.Random(number)
    family, layer = rng.choice(_FAMILIES), rng.randrange(N_LAYERS + 1)
    ids = torch.tensor([rng.choice((FIRST, SECOND, *range(VOCAB))) for _ in range(rng.choice((1, 4, 8)))])
    ids = torch.where(torch.rand(len(ids), generator=torch.Generator().manual_seed(number)) < 0.2, FIRST, ids)
    lm = LanguageModel(twin_model(family, FIRST, SECOND, seed=rng.randrange(2)), name=family)
    seen = lm.capture(input_ids=ids, layer=layer, dtype=rng.choice(("float32", "float32", "bfloat16", "float16")))
    true = certificate_of(sipit.invert(lm, seen, use_fit=False))
    how, record = _forged(rng, true, lm, seen)
    what = f"{family}, layer {layer}, {seen.dtype}, ids {ids.tolist()}, {true['verdict']}: {how}"
    try:
        if true["verdict"] != "unmatched" and not check_certificate(true, seen, lm).holds:
            return Case(number=number, what=what, outcome="does not hold", fault="a true record does not hold")
        check = check_certificate(record, seen, lm)
    except SipitError as error:
        fault = None if len(str(error)) < 400 else f"a message of {len(str(error))} characters"
        return Case(number=number, what=what, outcome="refused", fault=fault)
    except Exception as error:  # noqa: BLE001  whatever it is, it is a fault
        return Case(number=number, what=what, outcome="crashed", fault=f"{type(error).__name__}: {error}"[:300])
    fault = _false_claim(lm, seen, record, true) if check.holds else None
    return Case(number=number, what=what, outcome="holds" if check.holds else "does not hold", fault=fault)


def _forged(
    rng: random.Random, true: dict[str, Any], lm: LanguageModel, seen: Observation
) -> tuple[str, dict[str, Any]]:
    """Return what was forged, and the record with a digest that matches."""
    record = json.loads(json.dumps(true))
    positions, kind = record["positions"], rng.randrange(11)
    if kind == 0:
        how, raw = damaged_json(rng, json.dumps(true).encode())
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            return how, {}
        if not isinstance(record, dict):
            return how, {}
    elif kind == 1 and positions:
        place, token_id = rng.randrange(len(positions)), rng.randrange(VOCAB)
        positions[place] |= {"token_id": token_id, "rivals": []}
        record["input_ids"][place] = token_id
        how = f"token {token_id} at {place}"
    elif kind == 2:
        record["verdict"] = rng.choice(("recovered", "ambiguous", "unmatched"))
        how = f"verdict {record['verdict']}"
    elif kind == 3 and positions:
        record["verdict"], how = "recovered", "rivals left out"
        for position in positions:
            position["rivals"] = []
    elif kind == 4 and positions:
        record |= {"verdict": "ambiguous", "noise": 10 ** rng.uniform(-3, 6)}
        place = rng.randrange(len(positions))
        record["input_ids"][place] = positions[place]["token_id"] = rng.randrange(VOCAB)
        how = f"noise {record['noise']:.2g} and another token at {place}"
    elif kind == 5 and positions:
        how = _with_noise_model(rng, record, lm, seen)
    elif kind == 6 and positions:
        n_known = rng.randrange(1, 3)
        record["known_prefix"] = [rng.randrange(VOCAB) for _ in range(n_known)]
        how = f"{n_known} tokens said to be known"
    elif kind == 7 and positions:
        key, n = rng.choice((("row_order", len(positions)), ("column_order", seen.d_model)))
        order = list(range(n))
        rng.shuffle(order)
        record[key] = rng.choice((order, order[:-1], [0] * n, [*order[:-1], n]))
        how = f"{key} {record[key][:8]}"
    elif kind == 8 and positions:
        place = rng.randrange(len(positions))
        positions[place]["is_held"] = False
        record["input_ids"][place] = positions[place]["token_id"] = rng.randrange(VOCAB)
        how = f"no row said to be held at {place}, and another token there"
    elif kind == 9 and positions:
        extra = rng.randrange(VOCAB)
        record["input_ids"].append(extra)
        positions.append({**positions[-1], "token_id": extra, "is_held": rng.random() < 0.5})
        record["seq_len"] += 1
        how = f"token {extra} behind the last"
    else:
        record["input_ids"].reverse()
        positions.reverse()
        how = "reversed"
    record.pop("digest", None)
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return how, {**record, "digest": f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"}


def _with_noise_model(rng: random.Random, record: dict[str, Any], lm: LanguageModel, seen: Observation) -> str:
    """Claim other tokens under a noise model made to explain them."""
    ids, positions = record["input_ids"], record["positions"]
    for place in rng.sample(range(len(ids)), rng.randrange(1, len(ids) + 1)):
        ids[place] = positions[place]["token_id"] = rng.randrange(VOCAB)
        positions[place]["rivals"] = []
    states = lm.capture(input_ids=ids, layer=seen.layer).states.double()
    left = seen.states.double() - states  # (T, D)
    size = max(float(left.square().mean().sqrt()), 1e-9)
    draw = torch.Generator().manual_seed(rng.randrange(1 << 30))
    model: dict[str, Any] = {"law": "gaussian", "spread": size, "scale": 1.0, "shift": None, "drops": False}
    kind = rng.choice(("size", "coordinates", "shift", "large", "dropped", "scale"))
    if kind == "coordinates":
        model["spread"] = left.square().mean(dim=0).sqrt().clamp(min=1e-9).tolist()
    elif kind == "shift":
        model["spread"] = 0.01 * size
        model["shift"] = (left.mean(dim=0) + 0.01 * size * torch.randn(seen.d_model, generator=draw)).tolist()
    elif kind == "large":
        model["spread"] = size * 10 ** rng.uniform(0, 9)
    elif kind == "scale":
        model["scale"] = float((seen.states.double() * states).sum() / states.square().sum()) or 1.0
    elif kind == "dropped":
        model["drops"] = True
    record |= {
        "verdict": rng.choice(("probable", "probable", "ambiguous")),
        "posterior": 0.99,
        "text": lm.decode(ids),
        "noise_model": {**model, "sigma": size, "longest": None, "says": "noise", "is_estimated": True},
    }
    return f"ids {ids} under noise of kind {kind}"


def _false_claim(lm: LanguageModel, seen: Observation, record: dict[str, Any], true: dict[str, Any]) -> str | None:
    """Return what is false about a record that holds, by every token of the vocabulary in float64."""
    if record.get("noise_model"):
        return "a claim under noise is another one" if record["input_ids"] != true["input_ids"] else None
    seen = seen.arranged(row_order=record.get("row_order", ()), column_order=record.get("column_order", ()))
    if record.get("known_prefix"):
        return "holds behind a prefix that was not there"
    if len(record["input_ids"]) != len(true["input_ids"]) or not all(
        p.get("is_held", True) for p in record["positions"]
    ):
        return "holds with other positions than those observed"
    cut = LanguageModel(copy_of(lm.model).double(), name="wide").cut(seen.cut)
    claimed = record["input_ids"]
    for place, token_id in enumerate(claimed):
        prefix = torch.tensor(claimed[:place], dtype=torch.long)
        states = torch.stack([cut.ordinary(torch.cat([prefix, torch.tensor([v])]))[-1] for v in range(VOCAB)])
        distances = (states - seen.states[place].double()).norm(dim=1)  # (V,)
        limit = true["positions"][place]["tolerance"]
        allowed = limit + (record["noise"] if record["verdict"] == "ambiguous" else 0.0)
        if distances[token_id] > _CLEARLY * allowed:
            return f"position {place}: {float(distances[token_id]):.3g} away, {allowed:.3g} allowed"
        rivals = record["positions"][place]["rivals"] if record["verdict"] == "ambiguous" else []
        named = {token_id, *(rival["token_id"] for rival in rivals)}
        equal = (distances <= distances[token_id] * (1 + 1e-9)).nonzero()[:, 0].tolist()
        left_out = [v for v in equal if v not in named and distances[v] <= limit]
        if left_out:
            return f"position {place}: tokens {left_out} fit as well and are not named"
    return None


def main() -> int:
    """Run many cases from the command line: the number of them, and the first (default 0)."""
    torch.set_num_threads(1)
    n_cases = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    outcomes: Counter[str] = Counter()
    n_faults = 0
    for number in range(first, first + n_cases):
        case = forgery(number)
        outcomes[case.outcome] += 1
        if case.fault is not None:
            n_faults += 1
            print(f"FAULT {case.number}: {case.fault}; {case.what}", flush=True)
    print(f"{n_cases} forgeries: {dict(outcomes)}, {n_faults} faults")
    return 1 if n_faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
