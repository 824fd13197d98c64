"""The certificate: the record of an inversion, and its replay by one ordinary forward pass.

The replay trusts nothing of the search: it imports no proposal, runs its own forward pass on the
claimed tokens and measures its own tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from sipit.errors import CertificateError, InputError, OptionError, ShapeError
from sipit.inversion.evidence.digest import digest_of
from sipit.inversion.evidence.redaction import redacted
from sipit.inversion.evidence.result import MOST_RIVALS, POLICIES, Inversion, Verdict
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise import noise_floor
from sipit.inversion.judging.noise_model import noise_model
from sipit.inversion.judging.replay import replay
from sipit.inversion.judging.residuals import PROBABLE, residuals_of
from sipit.models import LanguageModel
from sipit.observations import Observation
from sipit.storage import read_json, write_json

_FORMAT = "sipit.certificate"
_VERSION = 2
_MOST_PROMPTS = 64  # other prompts of one claim that are run
_VALUES_A_PARAMETER = 8  # observed values for each number of a noise model, below which it fits whatever is claimed
_MOST_POSTERIOR = 1.01  # a sum of rounded probabilities may lie a little above 1
_LARGEST = 1e300  # a number beyond it is no distance, no count and no time
_TEXTS = ("digest", "model", "fingerprint", "site", "observation_sha256", "observation_dtype", "model_dtype")
_COUNTS = ("layer", "seq_len", "block_tokens", "calibration_block_tokens", "n_checked")  # whole numbers, 0 or more
_NUMBERS = ("tolerance", "noise", "seconds", "prefill_ratio")  # finite, 0 or more
_POSITION_NUMBERS = ("distance", "tolerance")


@dataclass(frozen=True, kw_only=True)
class CertificateCheck:
    """Whether a certificate holds for an observation and a model."""

    holds: bool
    reasons: tuple[str, ...]  # why not; empty if it holds
    verdict: Verdict  # the claim that was checked
    largest_distance: float | None  # over the positions; None if the replay could not run
    tolerance: float | None  # at that position
    block_tokens: int  # cost of the replay
    is_proof: bool = True  # whether holding proves the prompt; no residuals under a noise model do


def certificate_of(found: Inversion) -> dict[str, Any]:
    """Return the certificate of an inversion: its record, named, versioned and with a digest."""
    record = json.loads(json.dumps({"format": _FORMAT, "version": _VERSION, **found.record()}))
    return {**record, "digest": digest_of(record)}


def write_certificate(found: Inversion, path: Path | str, *, is_redacted: bool = False) -> None:
    """Write the record of an inversion as a certificate, whole or not at all, readable by its owner alone.

    `is_redacted` leaves the prompt out: see `redacted`. Nothing can be replayed from such a record.

    Raises:
        StorageError: the path cannot be written.
    """
    record = certificate_of(found)
    write_json(path, redacted(record) if is_redacted else record, is_private=True)


def read_certificate(path: Path | str) -> dict[str, Any]:
    """Read a certificate and check its keys and types.

    Raises:
        StorageError: the file cannot be read.
        CertificateError: it is not a certificate.
    """
    try:
        record = read_json(path)
    except (ValueError, RecursionError) as error:
        raise CertificateError(f"{path} is not JSON ({error}); write one with 'sipit invert --json'") from error
    return _validated(record, str(path))


def _validated(record: Any, path: str) -> dict[str, Any]:
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise CertificateError(f"{path} is not a certificate; write one with 'sipit invert --json'")
    if record.get("is_redacted") is True:
        raise CertificateError(
            f"{path} is redacted: it names no tokens, so there is nothing to replay; check the certificate that it was "
            "made of"
        )
    if type(record.get("version")) is int and record["version"] != _VERSION:
        raise CertificateError(
            f"{path} has version {str(record['version'])[:20]}, this sipit reads {_VERSION}; "
            "use the sipit that wrote it"
        )
    wrong = next(_wrong_keys(record), None)
    if wrong is not None:
        raise CertificateError(
            f"{path}: key {wrong!r} is missing or not what a certificate holds; write it again with "
            "'sipit invert --json'"
        )
    return record


def _wrong_keys(record: dict[str, Any]) -> Iterator[str]:
    """Yield the keys whose values no inversion can have written."""
    if type(record.get("version")) is not int:
        yield "version"
    yield from (key for key in _TEXTS if not _is_text(record.get(key)))
    yield from (key for key in _COUNTS if not _is_count(record.get(key)))
    yield from (key for key in ("wall_ratio",) if key in record and not _is_number(record[key]))
    yield from (key for key in ("n_passes",) if key in record and not _is_count(record[key]))
    yield from (key for key in _NUMBERS if not _is_number(record.get(key)))
    if record.get("text", ...) is not None and not _is_text(record.get("text")):
        yield "text"
    if record.get("verdict") not in get_args(Verdict):
        yield "verdict"
    if record.get("policy") not in POLICIES:
        yield "policy"
    ids, positions = record.get("input_ids"), record.get("positions")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        yield "input_ids"
    known = record.get("known_prefix", [])
    if not isinstance(known, list) or not all(type(i) is int for i in known):
        yield "known_prefix"
    if not isinstance(positions, list) or not all(map(_is_position, positions)):
        yield "positions"
    for key in ("row_order", "column_order"):
        order = record.get(key, [])
        if not isinstance(order, list) or not all(map(_is_count, order)):
            yield key
    others = record.get("other_prompts", [])
    if not isinstance(others, list) or not all(
        isinstance(ids, list) and all(type(i) is int for i in ids) for ids in others
    ):
        yield "other_prompts"
    yield from (key for key in ("miss", "noise_model", "residuals") if not isinstance(record.get(key), dict | None))
    if not _is_posterior(record.get("posterior")):
        yield "posterior"
    if record.get("verdict") == "probable" and not (record.get("noise_model") and record.get("posterior") is not None):
        yield "noise_model"


def _is_position(evidence: Any) -> bool:
    """Return whether this is the evidence of one position."""
    return (
        isinstance(evidence, dict)
        and type(evidence.get("token_id")) is int
        and _is_count(evidence.get("n_checked"))
        and all(_is_number(evidence.get(key)) for key in _POSITION_NUMBERS)
        and (evidence.get("runner_up") is None or _is_number(evidence["runner_up"]))
        and (evidence.get("token", ...) is None or _is_text(evidence.get("token")))
        and _is_posterior(evidence.get("posterior"))
        and isinstance(evidence.get("rivals"), list)
        and all(map(_is_rival, evidence["rivals"]))
        and type(evidence.get("is_held", True)) is bool
    )


def _is_rival(rival: Any) -> bool:
    """Return whether this names another token that fits as well."""
    return (
        isinstance(rival, dict)
        and type(rival.get("token_id")) is int
        and _is_number(rival.get("distance"))
        and (rival.get("token") is None or _is_text(rival["token"]))
        and _is_posterior(rival.get("posterior"))
    )


def _is_posterior(value: Any) -> bool:
    return value is None or (_is_number(value) and value <= _MOST_POSTERIOR)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LARGEST


def check_certificate(
    certificate: dict[str, Any] | Path | str, seen: Observation, lm: LanguageModel
) -> CertificateCheck:
    """Replay a certificate: do the claimed tokens, run through this model, give the observed states?

    Costs one ordinary forward pass of the claimed tokens. Holds for the verdicts "recovered" and
    "ambiguous"; a record of an unmatched search claims no prompt and never holds. Of a record with a noise
    model, what is replayed is whether the claimed tokens leave of the rows what that noise would: the
    posterior is the search's own word, so that it holds is no proof (`is_proof`).

    Rows whose file names no positions are replayed at those that the certificate names.

    Raises:
        CertificateError, StorageError: the certificate cannot be read.
    """
    if isinstance(certificate, dict):
        record = _validated(certificate, "the certificate")
    else:
        record = read_certificate(certificate)
    seen = _at_claimed_places(record, seen)
    reasons = _mismatches(record, seen, lm)
    distance = tolerance = None
    block_tokens = 0
    if not reasons:
        seen = _arranged(record, seen)
    if not reasons and record.get("noise_model") is not None:
        return _check_noisy(lm, seen, record)
    if not reasons:
        prefix = _known_prefix(record)
        ids = torch.tensor([*prefix, *record["input_ids"]], dtype=torch.long)
        noise = float(record["noise"]) if record["verdict"] == "ambiguous" else 0.0
        found = replay(lm, seen, ids, noise=noise)
        block_tokens = found.block_tokens
        worst = int(found.over.argmax())
        distance, tolerance = float(found.distances[worst]), float(found.allowed[worst])
        if not bool((found.over <= 0).all()):
            place = seen.positions[worst]
            reasons.append(
                f"position {place}: the claimed token {int(ids[place])} is {distance:.3g} from the "
                f"observed state, {float(found.excess[worst]):.3g} beyond its rounding; tolerance {tolerance:.2g}"
            )
        if noise:
            reasons += _too_much_noise(lm, seen, noise, found.needs_noise)
        reasons += _unnamed_equals(lm, record)
        reasons += _false_alternatives(lm, seen, record)
        if record["text"] != lm.decode(record["input_ids"]):
            reasons.append("the text is not what the claimed tokens decode to")
    return CertificateCheck(
        holds=not reasons,
        reasons=tuple(reasons),
        verdict=cast(Verdict, record["verdict"]),
        largest_distance=distance,
        tolerance=tolerance,
        block_tokens=block_tokens,
    )


def _check_noisy(lm: LanguageModel, seen: Observation, record: dict[str, Any]) -> CertificateCheck:
    """Replay a claim under a noise model: whether what the tokens leave of the rows is such noise."""
    meter = Meter()
    ids = torch.tensor([*_known_prefix(record), *record["input_ids"]], dtype=torch.long)
    try:
        noise = noise_model(record["noise_model"])
        noise.require_width(seen.d_model)
    except (OptionError, ShapeError) as error:
        raise CertificateError(f"the certificate's noise model cannot be used: {error}") from error
    residuals = residuals_of(lm, seen, ids, noise, meter)
    reasons = list(residuals.reasons)
    if record["verdict"] == "probable":
        reasons += residuals.doubts
    if _VALUES_A_PARAMETER * noise.n_parameters > seen.states.numel():
        reasons.append(
            f"the noise model has {noise.n_parameters} numbers for {seen.states.numel()} values, so it may be made to "
            "explain any prompt"
        )
    if record["text"] != lm.decode(record["input_ids"]):
        reasons.append("the text is not what the claimed tokens decode to")
    if record["verdict"] == "recovered":
        reasons.append("a record with a noise model proves nothing, so the verdict is not 'recovered'")
    if record["verdict"] == "probable" and record["posterior"] < PROBABLE:
        reasons.append(
            f"the posterior is {record['posterior']:.3g}, below {PROBABLE}, so the verdict is not 'probable'"
        )
    return CertificateCheck(
        holds=not reasons,
        reasons=tuple(reasons),
        verdict=cast(Verdict, record["verdict"]),
        largest_distance=None,
        tolerance=None,
        block_tokens=meter.block_tokens,
        is_proof=False,
    )


def _false_alternatives(lm: LanguageModel, seen: Observation, record: dict[str, Any]) -> list[str]:
    """Return why the other prompts that a claim about last rows names are none."""
    others = record.get("other_prompts", [])
    if not others:
        return []
    if record["verdict"] == "recovered":
        return ["the certificate names other prompts that fit, so the verdict is not 'recovered'"]
    for ids in others[:_MOST_PROMPTS]:
        is_possible = len(ids) >= seen.seq_len and all(0 <= i < lm.vocab_size for i in ids)
        if not is_possible or bool((replay(lm, seen.ending_at(len(ids)), torch.tensor(ids)).over > 0).any()):
            return [f"another prompt that the certificate names, {ids[:8]}, does not fit"]
    return []


def _unnamed_equals(lm: LanguageModel, record: dict[str, Any]) -> list[str]:
    """Return why a claim is too narrow: a token with the same embedding row gives the same states, and is not named."""
    for place, evidence in enumerate(record["positions"]):
        named = {rival["token_id"] for rival in evidence["rivals"]}
        named |= {ids[place] for ids in record.get("other_prompts", []) if len(ids) == len(record["positions"])}
        if record["verdict"] == "recovered" and evidence["rivals"]:
            return [f"position {place} names other tokens that fit, so the verdict is not 'recovered'"]
        twins = lm.embeddings.twins(evidence["token_id"])
        rows = lm.embeddings.rows(torch.tensor([evidence["token_id"], *twins]))  # (1 + N, D)
        equal = [twin for twin, row in zip(twins, rows[1:], strict=True) if torch.equal(row, rows[0])]
        left_out = [twin for twin in equal if twin not in named]
        if left_out and len(named & set(equal)) < MOST_RIVALS:
            return [
                f"position {place}: token {left_out[0]} has the same embedding row as {evidence['token_id']}, so its "
                "state is the same, but the certificate does not name it"
            ]
    return []


def _too_much_noise(lm: LanguageModel, seen: Observation, noise: float, is_needed: Tensor) -> list[str]:
    """Return why a declared noise proves nothing: at a position that needs it, other tokens lie within it too.

    How near other tokens come is measured with the noise floor, so the record has no part in it.
    """
    floor = noise_floor(lm, seen.cut, seen.n_positions)
    norms = seen.states.cpu().double().norm(dim=1)
    gaps = norms * floor.rest_gap  # (T,)
    if seen.positions[0] == 0:
        gaps[0] = norms[0] * floor.first_gap
    covered = ((gaps <= noise) & is_needed).nonzero()[:, 0].tolist()
    if not covered:
        return []
    return [
        f"position {covered[0]}: the declared noise of {noise:.3g} covers other tokens as well, which come within "
        f"{float(gaps[covered[0]]):.3g} there, so it is no evidence for the claimed one"
    ]


def _mismatches(record: dict[str, Any], seen: Observation, lm: LanguageModel) -> list[str]:
    """Return what forbids the replay, before any state is computed."""
    reasons = []
    known = _known_prefix(record)
    n_sought = seen.n_positions - len(known)
    body = {key: value for key, value in record.items() if key not in ("digest", "file")}
    if record["digest"] != digest_of(body):
        reasons.append("the certificate was edited: its digest does not match its content")
    if record["fingerprint"] != lm.fingerprint:
        reasons.append(
            f"the certificate is about the model {record['model']!r} with fingerprint {record['fingerprint'][:19]}…, "
            f"this is {lm.name!r} with {lm.fingerprint[:19]}…"
        )
    if seen.fingerprint is not None and seen.fingerprint != lm.fingerprint:
        reasons.append(f"the observation carries the fingerprint of another model, {seen.model!r}")
    if (record["layer"], record["site"]) != (seen.layer, seen.site):
        reasons.append(
            f"the certificate is about layer {record['layer']}, site {record['site']!r}, the observation about "
            f"layer {seen.layer}, site {seen.site!r}"
        )
    if record["observation_sha256"] != seen.digest():
        reasons.append("the observation is not the one the certificate is about: its digest differs")
    if record["verdict"] == "unmatched":
        reasons.append("the certificate records an unmatched search, which claims no prompt")
    elif not len(record["input_ids"]) == len(record["positions"]) == n_sought:
        reasons.append(f"the certificate names {len(record['input_ids'])} tokens, the observation has {n_sought}")
    if [position["token_id"] for position in record["positions"]] != record["input_ids"]:
        reasons.append("the evidence of the positions is about other tokens than the claimed ones")
    if record["seq_len"] != n_sought:
        reasons.append(f"the certificate is about {record['seq_len']} positions, the observation has {n_sought}")
    if not all(0 <= i < lm.vocab_size for i in [*record["input_ids"], *_known_prefix(record)]):
        reasons.append(f"a claimed token id is outside the vocabulary (0 to {lm.vocab_size - 1})")
    if seen.known_prefix and list(seen.known_prefix) != known:
        reasons.append("the certificate is about another known prefix than the observation's")
    if seen.positions != _claimed_places(record) and record["verdict"] != "unmatched":
        reasons.append(f"the observation holds other positions than the certificate, behind {len(known)} known tokens")
    try:
        lm.checked_layer(seen.layer, seen.site)
        if seen.d_model != lm.width(seen.cut):
            raise ShapeError(f"the observed states are {seen.d_model} wide, the model's {lm.width(seen.cut)}")
    except (OptionError, ShapeError) as error:
        reasons.append(str(error))
    return reasons


def _claimed_places(record: dict[str, Any]) -> tuple[int, ...]:
    """Return the positions that a claim says rows were held of."""
    first = len(_known_prefix(record))
    return tuple(first + i for i, evidence in enumerate(record["positions"]) if evidence.get("is_held", True))


def _at_claimed_places(record: dict[str, Any], seen: Observation) -> Observation:
    """Return an observation whose file names no positions at those of the claim, if there are as many."""
    places = _claimed_places(record)
    is_silent = not seen.known_prefix and seen.positions == tuple(range(seen.seq_len))
    return replace(seen, positions=places, is_last=False) if is_silent and len(places) == seen.seq_len else seen


def _arranged(record: dict[str, Any], seen: Observation) -> Observation:
    """Return an observation with its rows and columns in the order that the claim says."""
    try:
        return seen.arranged(row_order=record.get("row_order", ()), column_order=record.get("column_order", ()))
    except InputError as error:
        raise CertificateError(f"the certificate's order of rows or columns cannot be used: {error}") from error


def _known_prefix(record: dict[str, Any]) -> list[int]:
    """Return the token ids that the claim takes as known before the first row; none in older records."""
    return list(record.get("known_prefix", []))
