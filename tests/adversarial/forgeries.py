"""Seeded forged certificates, and what a replay must then not say.

One case is one number, which draws everything else. `python -m tests.adversarial.forgeries 1000` runs many
and prints a line for each fault; the suite runs a few of the same, and shows that they notice each check of a
replay that is left out.

The oracle shares nothing with the replay: it compares a record that holds with the honest one, and its tokens with
every token of the vocabulary, by the library's own forward pass in float64.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import sipit
from sipit import LanguageModel, Observation, SipitError
from sipit.inversion import CertificateCheck, certificate_of, check_certificate
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.inversion.judging.residuals import Residuals, residuals_of
from tests.adversarial.damage import damaged_json
from tests.tiny_models import N_LAYERS, VOCAB, copy_of, embedding_rows, true_states, twin_model

_FAMILIES = ("gpt2", "llama", "gemma3_text", "gpt_neox", "qwen3")
FIRST, SECOND = 17, 93  # tokens with equal rows
_MASSIVE = 5  # coordinate of an embedding that dwarfs all others, where a scene has one
_NOISY_ROWS = 64  # behind noise: what is said of its size and direction needs many values
_CLEARLY = 4.0  # times beyond a bound, or within it, from which float64 arithmetic decides
_ORDINARY = ("whole", "whole", "whole", "behind a prefix", "some rows", "rows out of order")  # scenes
_ODD: tuple[Any, ...] = (  # values that some key of a record must not have
    *(None, True, -1, -0.5, 1.5, 3, "\ud800", "x", [], {}, [None], [1.5], {"a": 1}, math.inf, math.nan, 10**400),
)
_GAUSSIAN = {
    "law": "gaussian",
    "spread": 1.0,
    "scale": 1.0,
    "shift": None,
    "drops": False,
    "longest": None,
    "sigma": 1.0,
    "says": "noise",
    "is_estimated": True,
}

Check = Callable[[dict[str, Any], Observation, LanguageModel], CertificateCheck]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One forgery, and what came of it."""

    number: int
    what: str
    outcome: str  # "holds", "does not hold" or "refused"
    fault: str | None


@dataclass(kw_only=True)
class Forgery:
    """A record that says something false, what it is shown beside, and the honest one it was made from."""

    lm: LanguageModel
    seen: Observation
    record: dict[str, Any]
    true: dict[str, Any]
    true_lm: LanguageModel
    true_seen: Observation
    scene: str
    what: str = ""
    lie: str | None = None  # what is false about it, where its maker alone can tell


def forgery(number: int) -> Case:
    """Run one case."""
    forged = made(number)
    is_claim = forged.true["verdict"] != "unmatched" and forged.scene != "noisy"  # of noise, one in 200 is unlikely
    if is_claim and not check_certificate(forged.true, forged.true_seen, forged.true_lm).holds:
        return Case(number=number, what=forged.what, outcome="does not hold", fault="a true record does not hold")
    return judged(number, forged)


def made(number: int, kind: str | None = None) -> Forgery:
    """Return one forgery of a kind, of one that the number draws where none is given; its digest matches."""
    rng = random.Random(f"forgery {number}")
    kind = kind or rng.choice(list(KINDS))
    how, scene = KINDS[kind]
    forged = _honest(rng, scene or rng.choice(_ORDINARY))
    did = how(rng, forged)
    if kind not in _OWN_DIGEST:
        forged.record["digest"] = _digest(forged.record)
    forged.what = (
        f"{forged.lm.name}, {forged.true_seen.cut}, {forged.true_seen.dtype}, {forged.scene}, "
        f"ids {forged.true['input_ids']}, {forged.true['verdict']}: {kind}: {did}"
    )
    return forged


def judged(number: int, forged: Forgery, check: Check = check_certificate) -> Case:
    """Return what a replay says of a forgery, and what is false about that."""
    try:
        holds = check(forged.record, forged.seen, forged.lm).holds
    except SipitError as error:
        fault = None if len(str(error)) < 400 else f"a message of {len(str(error))} characters"
        return Case(number=number, what=forged.what, outcome="refused", fault=fault)
    except Exception as error:  # noqa: BLE001  whatever it is, it is a fault
        fault = f"{type(error).__name__}: {error}"[:300]
        return Case(number=number, what=forged.what, outcome="crashed", fault=fault)
    fault = _false_claim(forged) if holds else None
    return Case(number=number, what=forged.what, outcome="holds" if holds else "does not hold", fault=fault)


@functools.cache
def _model(family: str, seed: int, *, is_massive: bool) -> LanguageModel:
    model = twin_model(family, FIRST, SECOND, seed=seed)
    if is_massive:
        rows = embedding_rows(model)
        rows.mul_(0.1)
        rows[:, _MASSIVE] = 1000.0
    return LanguageModel(model, name=family)


def _honest(rng: random.Random, scene: str) -> Forgery:
    """Return an observation and its honest record, not forged yet."""
    family, layer = rng.choice(_FAMILIES), rng.randrange(N_LAYERS + 1)
    if scene == "massive":
        family, layer = rng.choice(("llama", "qwen3")), 0  # in a block, the norm leaves little of the other coordinates
    if scene == "some rows":
        layer = max(layer, 1)  # before the first block no row tells of another's token
    lm = _model(family, rng.randrange(2), is_massive=scene == "massive")
    length = {"one row": 1, "noisy": _NOISY_ROWS, "whole": rng.choice((1, 4, 8))}.get(scene, 6)
    ids = [rng.choice((FIRST, SECOND, *range(VOCAB))) if rng.random() < 0.8 else FIRST for _ in range(length)]
    if scene == "without twins":
        ids = [token_id if token_id not in (FIRST, SECOND) else 0 for token_id in ids]
    dtype = "bfloat16" if scene == "massive" else rng.choice(("float32", "float32", "bfloat16", "float16"))
    seen = lm.capture(input_ids=ids, layer=layer, dtype="float32" if scene == "noisy" else dtype)
    if scene == "noisy":
        seen, true = _noisy(rng, lm, seen, ids)
    else:
        if scene == "behind a prefix":
            seen = replace(seen, states=seen.states[2:], positions=(2, 3, 4, 5), known_prefix=tuple(ids[:2]))
        if scene == "some rows":
            seen = replace(seen, states=seen.states[[0, 1, 3, 5]], positions=(0, 1, 3, 5))
        true = certificate_of(sipit.invert(lm, seen, use_fit=False))
    if scene == "rows out of order":
        order = rng.sample(range(seen.seq_len), seen.seq_len)
        seen = replace(seen, states=seen.states[torch.tensor(order).argsort()])
        true |= {"row_order": order, "observation_sha256": seen.digest()}
    true["digest"] = _digest(true)
    return Forgery(
        lm=lm, seen=seen, record=json.loads(json.dumps(true)), true=true, true_lm=lm, true_seen=seen, scene=scene
    )


def _noisy(
    rng: random.Random, lm: LanguageModel, seen: Observation, ids: list[int]
) -> tuple[Observation, dict[str, Any]]:
    """Return rows behind noise, and the record of a search that found their tokens."""
    size = 0.5 * float(seen.states.double().square().mean().sqrt())
    noisy = replace(seen, states=seen.states + size * _normal(rng, *seen.states.shape))
    record = certificate_of(sipit.invert(lm, replace(seen, states=seen.states[:1], positions=(0,)), use_fit=False))
    return noisy, {
        **record,
        "verdict": "probable",
        "posterior": 0.99,
        "noise_model": {**_GAUSSIAN, "spread": size},
        "input_ids": ids,
        "positions": [{**record["positions"][0], "token_id": token_id, "rivals": []} for token_id in ids],
        "seq_len": len(ids),
        "observation_sha256": noisy.digest(),
    }


def _normal(rng: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))


def _as_it_is(_: random.Random, forged: Forgery) -> str:
    return "nothing forged"


def _damaged(rng: random.Random, forged: Forgery) -> str:
    how, raw = damaged_json(rng, json.dumps(forged.true).encode())
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        record = {}
    forged.record = record if isinstance(record, dict) else {}
    return how


def odd_values(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a record with an odd value at each of its keys, one at a time, and with each key left out."""
    holders: list[Callable[[dict[str, Any]], dict[str, Any]]] = [lambda r: r, lambda r: r["positions"][0]]
    if record["positions"][0]["rivals"]:
        holders.append(lambda r: r["positions"][0]["rivals"][0])
    if record["noise_model"]:
        holders.append(lambda r: r["noise_model"])
    found = []
    for holder in holders:
        for key in holder(record):
            for value in (*_ODD, ...):
                copied = json.loads(json.dumps(record))
                if value is ...:
                    del holder(copied)[key]
                else:
                    holder(copied)[key] = value
                copied["digest"] = _digest(copied) if key != "digest" else copied.get("digest")
                found.append((f"{key} {'left out' if value is ... else f'= {str(value)[:20]!r}'}", copied))
    return found


def _odd_value(rng: random.Random, forged: Forgery) -> str:
    how, forged.record = rng.choice(odd_values(forged.record))
    return how


def _another_token(rng: random.Random, forged: Forgery) -> str:
    place = rng.randrange(len(forged.record["positions"]))
    token_id = rng.randrange(VOCAB)
    forged.record["positions"][place] |= {"token_id": token_id, "rivals": []}
    forged.record["input_ids"][place] = token_id
    return f"token {token_id} at {place}"


def _another_verdict(rng: random.Random, forged: Forgery) -> str:
    forged.record["verdict"] = rng.choice(("recovered", "ambiguous", "unmatched", "probable"))
    return f"verdict {forged.record['verdict']}"


def _without_rivals(rng: random.Random, forged: Forgery) -> str:
    forged.record["verdict"] = rng.choice(("recovered", "ambiguous"))
    for position in forged.record["positions"]:
        position["rivals"] = []
    return f"rivals left out, {forged.record['verdict']}"


def _false_rivals(rng: random.Random, forged: Forgery) -> str:
    """Name tokens that do not fit, as many as hide those that do."""
    n = rng.choice((1, 16, 16, 20))
    for position in forged.record["positions"]:
        others = [i for i in range(VOCAB) if i not in (FIRST, SECOND)]
        position["rivals"] = [{"token_id": i, "token": None, "distance": 0.0} for i in rng.sample(others, n)]
    forged.record["verdict"] = rng.choice(("recovered", "ambiguous"))
    return f"{n} other rivals, {forged.record['verdict']}"


def _declared_noise(rng: random.Random, forged: Forgery) -> str:
    record, how = forged.record, _another_token(rng, forged)
    record |= {"verdict": rng.choice(("ambiguous", "recovered")), "noise": 10 ** rng.uniform(-3, 6)}
    return f"noise {record['noise']:.2g}, {record['verdict']} and {how}"


def _false_prefix(rng: random.Random, forged: Forgery) -> str:
    known = forged.true["known_prefix"]
    n_known = len(known) or rng.randrange(1, 3)
    forged.record["known_prefix"] = [rng.randrange(VOCAB) for _ in range(n_known)]
    return f"tokens {forged.record['known_prefix']} said to be known"


def _another_order(rng: random.Random, forged: Forgery) -> str:
    key, n = rng.choice((("row_order", forged.seen.seq_len), ("column_order", forged.seen.d_model)))
    order = rng.sample(range(n), n)
    forged.record[key] = rng.choice((order, order[:-1], [0] * n, [*order[:-1], n]))
    return f"{key} {forged.record[key][:8]}"


def _not_held(rng: random.Random, forged: Forgery) -> str:
    how = _another_token(rng, forged) if rng.randrange(2) else "the same token"
    place = rng.randrange(len(forged.record["positions"]))
    position = forged.record["positions"][place]
    position["is_held"] = not position["is_held"]
    return f"a row said to be {'held' if position['is_held'] else 'missing'} at {place}, and {how}"


def _one_more(rng: random.Random, forged: Forgery) -> str:
    """Claim a token behind the last, of which no row tells."""
    record, extra = forged.record, rng.randrange(VOCAB)
    record["input_ids"].append(extra)
    record["positions"].append({**record["positions"][-1], "token_id": extra, "rivals": [], "is_held": False})
    return f"token {extra} behind the last"


def _one_more_counted(rng: random.Random, forged: Forgery) -> str:
    how = _one_more(rng, forged)
    forged.record["seq_len"] += 1
    forged.record["positions"][-1]["is_held"] = rng.random() < 0.5
    return f"{how}, of {forged.record['seq_len']}"


def _reversed(_: random.Random, forged: Forgery) -> str:
    forged.record["input_ids"].reverse()
    forged.record["positions"].reverse()
    return "reversed"


def _another_model(rng: random.Random, forged: Forgery) -> str:
    """Change weights that the observed states do not depend on: nothing but the fingerprint tells."""
    model = copy_of(forged.lm.model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(1.5 * head.weight.detach())  # no longer tied to the embedding
    forged.lm = LanguageModel(model, name=forged.lm.name)
    if rng.randrange(2):
        forged.seen = replace(forged.seen, fingerprint=None)
    return "another model"


def _says_another_model(_: random.Random, forged: Forgery) -> str:
    forged.seen = replace(forged.seen, fingerprint="sha256:" + 64 * "0")
    return "an observation of another model"


def _another_cut(rng: random.Random, forged: Forgery) -> str:
    sites = ("block", "final", "kv", "keys", "values", "logits", "nowhere")
    if rng.randrange(2):
        forged.record["layer"] = rng.choice([i for i in range(N_LAYERS + 2) if i != forged.seen.layer])
    else:
        forged.record["site"] = rng.choice([site for site in sites if site != forged.seen.site])
    return f"layer {forged.record['layer']}, site {forged.record['site']}"


def _impossible_observation(rng: random.Random, forged: Forgery) -> str:
    """Say, in the observation as well, what no cut of the model can have given."""
    how = rng.choice(("a layer beyond the last", "narrower rows"))
    if how == "narrower rows":
        forged.seen = replace(forged.seen, states=forged.seen.states[:, :-1])
    else:
        forged.seen = replace(forged.seen, layer=99)
        forged.record["layer"] = 99
    forged.record["observation_sha256"] = forged.seen.digest()
    return how


def _another_observation(rng: random.Random, forged: Forgery) -> str:
    """Hand over values that differ by one last digit: nothing but their digest tells."""
    states = forged.seen.states.clone()
    row, column = rng.randrange(states.shape[0]), rng.randrange(states.shape[1])
    states[row, column] = torch.nextafter(states[row, column], torch.full((), math.inf, dtype=states.dtype))
    forged.seen = replace(forged.seen, states=states)
    return f"another observation, by one digit of row {row}"


def _another_text(_: random.Random, forged: Forgery) -> str:
    forged.record["text"] = "I confess"
    return "another text"


def _other_evidence(rng: random.Random, forged: Forgery) -> str:
    """Leave the claim alone and give evidence of another token."""
    place = rng.randrange(len(forged.record["positions"]))
    forged.record["positions"][place]["token_id"] = (forged.record["input_ids"][place] + 1) % VOCAB
    return f"evidence of another token at {place}"


def _another_length(rng: random.Random, forged: Forgery) -> str:
    forged.record["seq_len"] += rng.choice((-1, 1, 1000))
    return f"{forged.record['seq_len']} positions"


def _outside(rng: random.Random, forged: Forgery) -> str:
    record, token_id = forged.record, rng.choice((-1, VOCAB, 10**30))
    if record["known_prefix"] and rng.randrange(2):
        record["known_prefix"][0] = token_id
        forged.seen = replace(forged.seen, known_prefix=tuple(record["known_prefix"]))
        return f"token {token_id} in the known prefix"
    place = rng.randrange(len(record["positions"]))
    record["input_ids"][place] = record["positions"][place]["token_id"] = token_id
    return f"token {token_id} at {place}"


def _old_digest(rng: random.Random, forged: Forgery) -> str:
    key = rng.choice(("n_checked", "seconds", "policy", "model"))
    forged.record[key] = {"policy": "random", "model": "another"}.get(key, 10**6)
    return f"{key} edited under the old digest"


def _other_prompts(rng: random.Random, forged: Forgery) -> str:
    """Name other prompts that do not fit, behind one that does or not, or that are none."""
    ids = forged.true["input_ids"]
    kind = rng.choice(("of other tokens", "shorter than the rows", "of tokens outside the vocabulary", "the same"))
    other = {
        "of other tokens": [rng.randrange(VOCAB) for _ in ids],
        "shorter than the rows": ids[1:],
        "of tokens outside the vocabulary": [*ids[:-1], VOCAB],
        "the same": ids,
    }[kind]
    others = [list(ids), other] if rng.randrange(2) else [other]
    forged.record |= {"other_prompts": others, "verdict": "ambiguous"}
    return f"{len(others)} other prompts, {kind}"


def _recovered_beside(_: random.Random, forged: Forgery) -> str:
    forged.record |= {"other_prompts": [[0, *forged.true["input_ids"][1:]]], "verdict": "recovered"}
    return "recovered beside another prompt"


def _false_posterior(rng: random.Random, forged: Forgery) -> str:
    record = forged.record
    record["posterior"] = rng.choice((0.0, 0.3, 0.94, 1.5, 1e9, None))
    return f"posterior {record['posterior']}"


def _recovered_behind_noise(_: random.Random, forged: Forgery) -> str:
    forged.record["verdict"] = "recovered"
    return "recovered"


def _text_behind_noise(_: random.Random, forged: Forgery) -> str:
    forged.record["text"] = "I confess"
    return "another text"


def _shift_made_to_fit(rng: random.Random, forged: Forgery) -> str:
    """Explain one row, whatever it is, by a vector that was added."""
    left = _claim_others(rng, forged)  # (1, D)
    size = 0.01 * float(left.norm()) / left.shape[1] ** 0.5
    shift = left[0] + size * _normal(rng, left.shape[1]).double()
    return _claim_noise(forged, spread=max(size, 1e-9), shift=shift.tolist())


def _each_its_own(rng: random.Random, forged: Forgery) -> str:
    """Explain rows by noise of another size at each coordinate, and a vector that was added."""
    left = _claim_others(rng, forged)  # (T, D)
    shift = left.mean(dim=0) if rng.randrange(2) else torch.zeros_like(left[0])
    spread = (left - shift).square().mean(dim=0).sqrt().clamp(min=1e-9)
    return _claim_noise(forged, spread=spread.tolist(), shift=shift.tolist())


def _large_noise(rng: random.Random, forged: Forgery) -> str:
    left = _claim_others(rng, forged)
    return _claim_noise(forged, spread=float(left.square().mean().sqrt()) * 10 ** rng.choice((0.0, rng.uniform(0, 9))))


def _rows_of_noise(rng: random.Random, forged: Forgery) -> str:
    """Observe noise alone, of the size that the record says."""
    size = 100.0 * forged.true["noise_model"]["spread"]
    _observe(forged, size * _normal(rng, *forged.seen.states.shape))
    forged.lie = "the rows say nothing of any token"
    return _claim_noise(forged, spread=size)


_UNSURE = {"verdict": "ambiguous", "posterior": 0.5}  # of which less is asked than of a probable prompt


def _noisier_row(rng: random.Random, forged: Forgery) -> str:
    size, row = forged.true["noise_model"]["spread"], rng.randrange(forged.seen.seq_len)
    states = forged.seen.states.clone()
    states[row] += 3 * size * _normal(rng, forged.seen.d_model)
    _observe(forged, states)
    forged.record |= _UNSURE
    forged.lie = f"row {row} has more noise than the record says"
    return f"more noise in row {row}"


def _noise_of_tokens(rng: random.Random, forged: Forgery) -> str:
    """Observe noise of the size that the record says, but along the directions in which tokens differ."""
    size, (n_rows, width) = forged.true["noise_model"]["spread"], forged.seen.states.shape
    directions = torch.linalg.svd(_deviations(forged)).Vh[:6]  # (6, D)
    noise = _normal(rng, n_rows, 6) @ directions
    noise *= size * width**0.5 / noise.norm(dim=1, keepdim=True)
    _observe(forged, _states_of_true(forged) + noise)
    forged.record |= _UNSURE
    forged.lie = "the noise lies along the directions in which tokens differ"
    return forged.lie


def _token_in_a_row(rng: random.Random, forged: Forgery) -> str:
    """Observe a row of the right size that lies too far along lesser directions in which tokens differ.

    As far as it takes to be told from noise: by more than that, its size gives it away as well.
    """
    row = rng.randrange(forged.seen.seq_len)
    seed = rng.randrange(1 << 30)
    for step in range(60, 300, 3):
        rows = _moved_along(random.Random(seed), forged, [row], inside=step / 10, in_all=2.0)
        if _residuals(forged, rows).row_along > 4.02:
            break
    _observe(forged, rows)
    forged.lie = f"a token hides in the noise of row {row}"
    return forged.lie


def _tokens_in_all_rows(rng: random.Random, forged: Forgery) -> str:
    """As `_token_in_a_row`, all rows, each by so little that none of them tells."""
    _observe(forged, _moved_along(rng, forged, range(forged.seen.seq_len), inside=1.3, in_all=1.0))
    forged.lie = "tokens hide in the noise of all rows"
    return forged.lie


def _vector_in_all_rows(rng: random.Random, forged: Forgery) -> str:
    """Observe rows that all hold a little of one vector, less than their size tells."""
    size, width = forged.true["noise_model"]["spread"], forged.seen.d_model
    vector = _normal(rng, width)
    rows = forged.seen.states
    for step in range(2, 60):
        rows = forged.seen.states + step / 10 * size * vector / vector.norm()
        if _residuals(forged, rows).in_common > 3.02:
            break
    _observe(forged, rows)
    forged.lie = "one vector was added to all rows"
    return forged.lie


def _noisier_half(_: random.Random, forged: Forgery) -> str:
    """Observe more noise in one half of the rows and as much less in the other, so that neither row nor sum tells."""
    states, half = _states_of_true(forged), forged.seen.seq_len // 2
    rows = forged.seen.states
    for step in range(2, 60):
        louder = torch.ones(len(states), 1)
        louder[:half], louder[half:] = 1 + step / 100, 1 - step / 100
        rows = states + louder * (forged.seen.states - states)
        if _residuals(forged, rows).in_a_run > 4.02:
            break
    _observe(forged, rows)
    forged.lie = "half of the rows have another noise"
    return forged.lie


def _moved_along(rng: random.Random, forged: Forgery, rows: Iterable[int], *, inside: float, in_all: float) -> Tensor:
    """Return the rows with so many standard deviations of energy along nearly all token directions, and in all."""
    size, width = forged.true["noise_model"]["spread"], forged.seen.d_model
    along, n_held = _held(_differences(forged), 0.9)
    noise = (forged.seen.states - _states_of_true(forged)) / size  # (T, D)
    for row in rows:
        own = noise[row] @ along.T @ along
        lesser = _normal(rng, n_held - 3) @ along[3:]
        wanted = n_held + inside * (2 * n_held) ** 0.5
        left = max(width + in_all * (2 * width) ** 0.5 - wanted, 0.2)
        mixed, outside = own / own.norm() + 2 * lesser / lesser.norm(), noise[row] - own
        noise[row] = wanted**0.5 * mixed / mixed.norm() + left**0.5 * outside / outside.norm()
    moved: Tensor = _states_of_true(forged) + size * noise
    return moved


def _residuals(forged: Forgery, rows: Tensor) -> Residuals:
    noise = NoiseModel.gaussian(forged.true["noise_model"]["spread"])
    ids = torch.tensor(forged.true["input_ids"])
    return residuals_of(forged.lm, replace(forged.seen, states=rows), ids, noise, Meter())


def _rows_of_another_scale(rng: random.Random, forged: Forgery) -> str:
    """Observe states of another scale than the record says, by little more than can be told behind the noise."""
    spread, gap = forged.true["noise_model"]["spread"], float(_deviations(forged).square().mean().sqrt())
    error = spread / gap / forged.seen.states.numel() ** 0.5  # of a scale that is fitted to the rows
    scale = 1 + rng.choice((-1, 1)) * (0.05 + 9 * error)
    _observe(forged, forged.seen.states + (scale - 1) * _states_of_true(forged))
    forged.record |= _UNSURE
    forged.lie = f"the rows are of scale {scale:.3g}"
    return forged.lie


def _states_of_true(forged: Forgery) -> Tensor:
    return forged.lm.capture(input_ids=forged.true["input_ids"], layer=forged.seen.layer).states


def _deviations(forged: Forgery) -> Tensor:
    """Return how the states of other tokens at one place differ from their mean. (75, D)."""
    prefix = forged.true["input_ids"][:5]
    captured = [forged.lm.capture(input_ids=[*prefix, other], layer=forged.seen.layer) for other in range(0, VOCAB, 2)]
    states = torch.stack([seen.states[-1] for seen in captured])
    return states - states.mean(dim=0)


def _held(differences: Tensor, share: float) -> tuple[Tensor, int]:
    """Return the directions that hold a share of the energy of differences, and their number K. (N, D) → (K, D)."""
    _, values, directions = torch.linalg.svd(differences)
    n_held = int((values.square().cumsum(dim=0) < share * values.square().sum()).sum()) + 1
    return directions[:n_held], n_held


def _differences(forged: Forgery) -> Tensor:
    """Return how the states of other tokens differ from that of the claimed one, at every eighth place. (N, D)."""
    ids = forged.true["input_ids"]

    def state(place: int, token: int) -> Tensor:
        return forged.lm.capture(input_ids=[*ids[:place], token], layer=forged.seen.layer).states[-1]

    places = range(0, len(ids), 8)
    return torch.stack([state(p, other) - state(p, ids[p]) for p in places for other in range(0, VOCAB, 12)])


def _odd_noise_model(rng: random.Random, forged: Forgery) -> str:
    """Put a value into the noise model that is none."""
    model = forged.record["noise_model"]
    key = rng.choice(("law", "spread", "scale", "shift", "longest"))
    wide = [math.nan] * forged.seen.d_model
    model[key] = rng.choice(("x", [1.0, 2.0], -1.0, 0.0, {}, math.inf, math.nan, wide, 10**400, [], [[1.0]]))
    return f"{key} is {str(model[key])[:20]}"


def _claim_others(rng: random.Random, forged: Forgery) -> Tensor:
    """Claim other tokens, and return what their states leave of the rows. (T, D) float64."""
    ids, positions = forged.record["input_ids"], forged.record["positions"]
    for place, position in enumerate(positions):
        ids[place] = rng.randrange(VOCAB)
        position |= {"token_id": ids[place], "rivals": []}
    states = forged.lm.capture(input_ids=ids, layer=forged.seen.layer).states
    return forged.seen.states.double() - states.double()


def _claim_noise(forged: Forgery, *, spread: float | list[float], shift: list[float] | None = None) -> str:
    forged.record |= {
        "verdict": "probable",
        "posterior": 0.99,
        "text": forged.lm.decode(forged.record["input_ids"]),
        "noise_model": {**_GAUSSIAN, "spread": spread, "shift": shift},
    }
    return f"ids {forged.record['input_ids']} under noise"


def _observe(forged: Forgery, states: Tensor) -> None:
    forged.seen = replace(forged.seen, states=states)
    forged.record["observation_sha256"] = forged.seen.digest()


# kind → (what forges it, the scene that it needs; None: any of the ordinary ones)
KINDS: dict[str, tuple[Callable[[random.Random, Forgery], str], str | None]] = {
    "nothing": (_as_it_is, None),
    "damaged JSON": (_damaged, None),
    "an odd value": (_odd_value, None),
    "another token": (_another_token, None),
    "another verdict": (_another_verdict, None),
    "rivals left out": (_without_rivals, None),
    "rivals that do not fit": (_false_rivals, None),
    "a declared noise": (_declared_noise, None),
    "a declared noise behind a massive coordinate": (_declared_noise, "massive"),
    "a token behind a massive coordinate": (_another_token, "massive"),
    "a known prefix": (_false_prefix, None),
    "a known prefix instead of another": (_false_prefix, "behind a prefix"),
    "an order": (_another_order, None),
    "a row not held": (_not_held, None),
    "a hole that is held": (_not_held, "some rows"),
    "a token more": (_one_more, None),
    "a token more, counted": (_one_more_counted, None),
    "reversed": (_reversed, None),
    "another model": (_another_model, None),
    "an observation of another model": (_says_another_model, None),
    "another cut": (_another_cut, None),
    "an impossible observation": (_impossible_observation, None),
    "another observation": (_another_observation, None),
    "another text": (_another_text, None),
    "evidence of other tokens": (_other_evidence, None),
    "another length": (_another_length, None),
    "a token outside the vocabulary": (_outside, None),
    "a known token outside the vocabulary": (_outside, "behind a prefix"),
    "an old digest": (_old_digest, None),
    "other prompts": (_other_prompts, "whole"),
    "recovered beside other prompts": (_recovered_beside, "without twins"),
    "a posterior": (_false_posterior, "noisy"),
    "recovered behind noise": (_recovered_behind_noise, "noisy"),
    "another text behind noise": (_text_behind_noise, "noisy"),
    "a shift made to fit": (_shift_made_to_fit, "one row"),
    "noise of another size at each coordinate": (_each_its_own, "noisy"),
    "large noise": (_large_noise, "noisy"),
    "rows of noise alone": (_rows_of_noise, "noisy"),
    "a row noisier than said": (_noisier_row, "noisy"),
    "noise along the tokens": (_noise_of_tokens, "noisy"),
    "a token in the noise of a row": (_token_in_a_row, "noisy"),
    "tokens in the noise": (_tokens_in_all_rows, "noisy"),
    "a vector in the noise of all rows": (_vector_in_all_rows, "noisy"),
    "more noise in half of the rows": (_noisier_half, "noisy"),
    "rows of another scale": (_rows_of_another_scale, "noisy"),
    "an odd noise model": (_odd_noise_model, "noisy"),
}
_OWN_DIGEST = ("an old digest", "an odd value")


def _digest(record: dict[str, Any]) -> str:
    """Return the digest that docs/certificate.md describes."""
    body = {key: value for key, value in record.items() if key not in ("digest", "file")}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


# what docs/certificate.md says of each key → the keys
_WRITTEN: dict[str, str] = {
    "text": "format model fingerprint site observation_sha256 observation_dtype model_dtype digest",
    "text or null": "text token",
    "count": "version layer seq_len block_tokens calibration_block_tokens n_checked n_passes",
    "number": "tolerance noise seconds prefill_ratio wall_ratio distance",
    "number or null": "runner_up posterior",
    "id": "token_id",
    "ids": "input_ids known_prefix row_order column_order",
    "prompts": "other_prompts",
    "object or null": "miss noise_model residuals",
    "objects": "positions rivals",
    "flag": "is_held",
    "verdict": "verdict",
    "policy": "policy",
}
_OPTIONAL = (  # that records of the same version may lack
    *("known_prefix", "wall_ratio", "n_passes", "posterior", "noise_model", "residuals", "row_order", "column_order"),
    *("other_prompts", "miss", "is_held", "runner_up"),
)


def _is_written(sort: str, value: Any) -> bool:
    """Return whether an inversion can have written a value of that sort."""
    if sort.endswith(" or null"):
        return value is None or _is_written(sort.removesuffix(" or null"), value)
    if sort in ("count", "id"):
        return type(value) is int and (sort == "id" or 0 <= value < 1e300)
    if sort == "number":
        return type(value) in (int, float) and 0 <= value <= 1e300
    if sort in ("ids", "objects", "prompts"):
        return isinstance(value, list) and all(_is_written(sort[:-1], each) for each in value)
    return {
        "text": lambda: isinstance(value, str) and value == value.encode(errors="ignore").decode(),
        "prompt": lambda: _is_written("ids", value),
        "object": lambda: isinstance(value, dict),
        "flag": lambda: isinstance(value, bool),
        "verdict": lambda: value in ("recovered", "ambiguous", "probable", "unmatched"),
        "policy": lambda: value in ("auto", "likely", "gradient", "random", "vocabulary"),
    }[sort]()


def _false_value(record: dict[str, Any], true: dict[str, Any]) -> str | None:
    """Return a key whose value no inversion can have written there."""
    sorts = {key: sort for sort, keys in _WRITTEN.items() for key in keys.split()}
    places = [("", record, true)]
    for i, position in enumerate(record["positions"] if _is_written("objects", record.get("positions")) else ()):
        rivals = position["rivals"] if _is_written("objects", position.get("rivals")) else ()
        places.append((f" at {i}", position, true["positions"][0]))
        places += [(f" of a rival at {i}", rival, {"token_id": 0, "distance": 0.0}) for rival in rivals]
    for where, values, honest in places:
        for key in sorted(honest.keys() - values.keys()):
            if key not in _OPTIONAL:
                return f"{key}{where} is missing"
        for key, value in values.items():
            if key in sorts and not _is_written(sorts[key], value):
                return f"{key}{where} is {str(value)[:40]!r}"
            if key == "posterior" and value is not None and value > 1.01:
                return f"a posterior of {value}"
    return None


def _false_claim(forged: Forgery) -> str | None:
    """Return what is false about a record that holds."""
    record, true, seen, lm = forged.record, forged.true, forged.seen, forged.lm
    return (
        forged.lie
        or _false_value(record, true)
        or _false_about(record, true, seen, lm)
        or _false_noise(record, true)
        or _false_tokens(forged)
    )


def _false_about(record: dict[str, Any], true: dict[str, Any], seen: Observation, lm: LanguageModel) -> str | None:
    """Return what is false about what a record is about, apart from its tokens."""
    ids, positions = record["input_ids"], record["positions"]
    others = [ids for ids in record.get("other_prompts", []) if ids != record["input_ids"]]
    held = [[p.get("is_held", True) for p in which["positions"]] for which in (record, true)]
    claims = {
        "it was edited under the old digest": record["digest"] == _digest(record),
        "it names another format or version": all(record[key] == true[key] for key in ("format", "version")),
        "it is about another model": record["fingerprint"] == lm.fingerprint
        and seen.fingerprint in (None, lm.fingerprint),
        "it is about another cut": (record["layer"], record["site"]) == (seen.layer, seen.site),
        "it is about another observation": record["observation_sha256"] == seen.digest(),
        "it claims no prompt": record["verdict"] != "unmatched",
        "it counts other positions": len(ids) == len(positions) == record["seq_len"] == len(true["input_ids"]),
        "it gives evidence of other tokens": [p["token_id"] for p in positions] == ids,
        "it knows another prefix": record.get("known_prefix", []) == true["known_prefix"],
        "it has another text": record["text"] == lm.decode(ids),
        "it holds other rows": held[0] == held[1],
        "it is recovered beside others that fit": record["verdict"] != "recovered"
        or not (others or any(p["rivals"] for p in positions)),
    }
    return next((what for what, is_true in claims.items() if not is_true), None)


def _false_noise(record: dict[str, Any], true: dict[str, Any]) -> str | None:
    """Return what is false about a claim under noise."""
    if not record.get("noise_model"):
        return "probable without a noise model" if record["verdict"] == "probable" else None
    if record["verdict"] == "recovered":
        return "recovered under a noise model"
    if (wrong := _false_noise_model(record["noise_model"])) is not None:
        return f"a noise model whose {wrong}"
    if record["verdict"] == "probable" and (record["posterior"] is None or record["posterior"] < 0.95):
        return f"probable at {record['posterior']}"
    return "a claim under noise is another one" if record["input_ids"] != true["input_ids"] else None


def _false_noise_model(model: dict[str, Any]) -> str | None:
    """Return what is no number of a noise model."""
    spread: Any = model.get("spread")
    shift, longest = model.get("shift"), model.get("longest")
    if model.get("law") not in ("gaussian", "uniform"):
        return f"law is {model.get('law')!r:.20}"
    if not all(_is_finite(each) and each > 0 for each in (spread if isinstance(spread, list) else [spread])):
        return f"spread is {spread!r:.20}"
    if not (_is_finite(model.get("scale")) and model["scale"] != 0):
        return f"scale is {model.get('scale')!r:.20}"
    if shift is not None and not (isinstance(shift, list) and all(map(_is_finite, shift))):
        return f"shift is {shift!r:.20}"
    is_length = longest is None or (_is_finite(longest) and float(longest) > 0)
    return None if is_length else f"length is {longest!r:.20}"


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _false_tokens(forged: Forgery) -> str | None:
    """Return which claimed token is not in the rows, by every token of the vocabulary in float64."""
    record, true = forged.record, forged.true
    if record.get("noise_model"):
        return None
    if true.get("noise_model"):
        return "it holds without noise, of rows behind noise"
    seen = forged.seen.arranged(row_order=record.get("row_order", ()), column_order=record.get("column_order", ()))
    n_known = len(true["known_prefix"])
    claimed, others = [*true["known_prefix"], *record["input_ids"]], record.get("other_prompts", [])
    limits = {n_known + i: p["tolerance"] for i, p in enumerate(true["positions"])}
    rows = dict(zip(forged.true_seen.positions, seen.states.double(), strict=True))
    for place, row in rows.items():
        for ids in others:
            if len(ids) != len(claimed) or not all(0 <= i < VOCAB for i in ids):
                return f"another prompt of {len(ids)} tokens"
            gap = float((_states(forged, ids[:place], [ids[place]])[0] - row).norm())
            if gap > _CLEARLY * limits[place]:
                return f"position {place}: another prompt is {gap:.3g} away"
        distances = (_states(forged, claimed[:place], list(range(VOCAB))) - row).norm(dim=1)  # (V,)
        token_id, limit = claimed[place], limits[place]
        allowed = limit + (record["noise"] if record["verdict"] == "ambiguous" else 0.0)
        if distances[token_id] > _CLEARLY * allowed:
            return f"position {place}: {float(distances[token_id]):.3g} away, {allowed:.3g} allowed"
        evidence = record["positions"][place - n_known]
        named = {token_id, *(rival["token_id"] for rival in evidence["rivals"]), *(ids[place] for ids in others)}
        equal = (distances <= distances[token_id] * (1 + 1e-9)).nonzero()[:, 0].tolist()
        left_out = [v for v in equal if v not in named and distances[v] <= limit]
        if left_out:
            return f"position {place}: tokens {left_out} fit as well and are not named"
    return None


def _states(forged: Forgery, prefix: list[int], token_ids: list[int]) -> Tensor:
    """Return the states of tokens behind a prefix by the library's own forward pass in float64. (N, D)."""
    ids = torch.tensor([[*prefix, token_id] for token_id in token_ids])  # (N, P + 1)
    states = true_states(_wide(forged.true_lm), forged.true_lm.name, ids)[(forged.true_seen.layer, "block")]
    return states[:, -1]


@functools.cache
def _wide(lm: LanguageModel) -> Any:
    return copy_of(lm.model).double()


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
