"""A redacted record tells how an inversion went, and nothing of the prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sipit
from sipit import Inversion, LanguageModel
from sipit.errors import CertificateError
from sipit.inversion import certificate_of, check_certificate, redacted, write_certificate
from tests.tiny_models import text_model, twin_model

TEXT = "zyx qvj"
_TELLING = {"text", "input_ids", "token_id", "token", "rivals", "known_prefix", "other_prompts", "diagnosis"}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model(bos=False)


@pytest.fixture(scope="module")
def found(lm: LanguageModel) -> Inversion:
    return sipit.invert(lm, lm.capture(TEXT, layer=2))


def _keys(value: Any) -> set[str]:
    """Return every key anywhere inside a record."""
    if isinstance(value, dict):
        return set(value).union(*map(_keys, value.values()))
    return set[str]().union(*map(_keys, value)) if isinstance(value, list) else set()


def _unmatched(lm: LanguageModel) -> Inversion:
    seen = lm.capture(TEXT, layer=2)
    states = seen.states.clone()
    states[4] += 1
    return sipit.invert(lm, replace(seen, states=states), policy="vocabulary")


def test_redacted_record_names_no_text_and_no_token(found: Inversion, lm: LanguageModel) -> None:
    for one in (found, _unmatched(lm)):
        record = redacted(certificate_of(one))
        assert not _keys(record) & _TELLING
        assert "zyx" not in json.dumps(record)
        assert str(list(one.input_ids[:4]))[1:-1] not in json.dumps(record)


def test_redacted_record_keeps_verdict_distances_costs_and_hashes(found: Inversion) -> None:
    whole = certificate_of(found)
    record = redacted(whole)
    kept = whole.keys() & record.keys() - {"digest", "positions"}
    assert all(record[key] == whole[key] for key in kept)
    assert {"verdict", "tolerance", "seconds", "n_passes", "observation_sha256", "fingerprint", "policy"} <= kept
    assert [p["distance"] for p in record["positions"]] == [p.distance for p in found.positions]
    assert record["certificate_digest"] == whole["digest"]


def test_every_key_of_a_certificate_is_kept_or_known_to_tell(found: Inversion) -> None:
    """A key that is new is left out until somebody has decided that it tells nothing."""
    whole = certificate_of(found)
    left_out = whole.keys() - redacted(whole).keys()
    assert left_out == {"text", "input_ids", "known_prefix", "other_prompts", "row_order", "column_order"}


def test_redacted_record_counts_the_rivals_it_does_not_name() -> None:
    lm = LanguageModel(twin_model("llama", 4, 90))
    record = redacted(certificate_of(sipit.invert(lm, lm.capture(input_ids=[7, 4, 33], layer=2))))
    assert [p["n_rivals"] for p in record["positions"]] == [0, 1, 0]


def test_redacted_record_is_refused_by_a_replay(found: Inversion, lm: LanguageModel, tmp_path: Path) -> None:
    write_certificate(found, tmp_path / "c.json", is_redacted=True)
    with pytest.raises(CertificateError, match="is redacted: it names no tokens"):
        check_certificate(tmp_path / "c.json", lm.capture(TEXT, layer=2), lm)


def test_redacted_record_of_a_miss_says_where_it_ended(lm: LanguageModel) -> None:
    found = _unmatched(lm)
    assert found.miss is not None
    miss = redacted(certificate_of(found))["miss"]
    assert miss == {
        "position": 4,
        "distance": found.miss.distance,
        "tolerance": found.miss.tolerance,
        "runner_up": found.miss.runner_up,
        "n_checked": found.miss.n_checked,
    }
    assert torch.tensor(miss["distance"]) > miss["tolerance"]
