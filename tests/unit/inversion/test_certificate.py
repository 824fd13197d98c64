"""A certificate holds for what was found, and for nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sipit
from sipit import Inversion, LanguageModel, Observation
from sipit.errors import CertificateError, StorageError
from sipit.inversion import CertificateCheck, check_certificate, write_certificate
from tests.tiny_models import VOCAB, blocks_of, copy_of, embedding_rows, text_model, tiny_model, twin_model

TEXT = "sworn 🦔\n"
KEYS = (
    *("format", "version", "digest", "model", "fingerprint", "layer", "site", "policy", "verdict", "text"),
    *("input_ids", "seq_len", "tolerance", "noise", "seconds", "block_tokens", "prefill_ratio", "n_checked"),
    *(
        "calibration_block_tokens",
        "observation_sha256",
        "observation_dtype",
        "model_dtype",
        "positions",
        "miss",
        "known_prefix",
    ),
    *("wall_ratio", "n_passes", "posterior", "noise_model", "residuals", "row_order", "column_order"),
    "other_prompts",
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model(bos=True)


@pytest.fixture(scope="module")
def seen(lm: LanguageModel) -> Observation:
    return lm.capture(TEXT, layer=2)


@pytest.fixture(scope="module")
def found(lm: LanguageModel, seen: Observation) -> Inversion:
    return sipit.invert(lm, seen)


@pytest.fixture
def path(found: Inversion, tmp_path: Path) -> Path:
    write_certificate(found, tmp_path / "certificate.json")
    return tmp_path / "certificate.json"


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return record


def _forge(path: Path, **changes: Any) -> None:
    """Edit a certificate and give it a digest that matches, as someone who knows the format could."""
    record = {**_read(path), **changes}
    if "input_ids" in changes and "positions" not in changes:  # the evidence is about the forged ids too
        record["positions"] = [
            {**p, "token_id": i} for p, i in zip(record["positions"], record["input_ids"], strict=False)
        ]
    del record["digest"]
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    record["digest"] = f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
    path.write_text(json.dumps(record), "utf-8")


def _refused(path: Path, seen: Observation, lm: LanguageModel) -> bool:
    """Return whether a certificate is turned down, as false or as unreadable."""
    try:
        return not check_certificate(path, seen, lm).holds
    except CertificateError:
        return True


def test_certificate_holds_for_what_was_found(path: Path, seen: Observation, lm: LanguageModel) -> None:
    check: CertificateCheck = check_certificate(path, seen, lm)
    assert check.holds
    assert check.reasons == ()
    assert check.verdict == "recovered"
    assert check.largest_distance is not None
    assert check.tolerance is not None
    assert check.largest_distance <= check.tolerance


def test_certificate_holds_after_a_trip_through_the_files(path: Path, seen: Observation, tmp_path: Path) -> None:
    sipit.write_observation(seen, tmp_path / "seen.safetensors")
    again = text_model(bos=True, name="the same model under another name")
    assert check_certificate(str(path), sipit.read_observation(tmp_path / "seen.safetensors"), again).holds


@pytest.mark.parametrize(("layer", "dtype"), [(0, "bfloat16"), (1, "float32"), (2, "float16"), (4, "bfloat16")])
def test_certificate_of_every_family_holds(family_lm: LanguageModel, layer: int, dtype: str, tmp_path: Path) -> None:
    seen = family_lm.capture(input_ids=[3, 77, 149, 3], layer=layer, dtype=dtype)
    write_certificate(sipit.invert(family_lm, seen, policy="vocabulary"), tmp_path / "c.json")
    assert check_certificate(tmp_path / "c.json", seen, family_lm).holds


def test_replay_costs_one_ordinary_forward_pass(path: Path, seen: Observation, lm: LanguageModel) -> None:
    check_certificate(path, seen, lm)  # measures the tolerance, once per model
    counted: list[int] = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[1]))
        for block in list(lm.model.model.layers)  # type: ignore[union-attr,arg-type]
    ]
    check = check_certificate(path, seen, lm)
    for hook in hooks:
        hook.remove()
    assert sum(counted) == check.block_tokens == seen.seq_len * seen.layer
    assert len(blocks_of(tiny_model("llama"))) == 4


@pytest.mark.parametrize("key", KEYS)
def test_certificate_rejects_an_edit_of_any_key(path: Path, seen: Observation, lm: LanguageModel, key: str) -> None:
    record = _read(path)
    assert set(record) == set(KEYS)
    value = record[key]
    edited: Any = {str: f"{value}x", int: 7, float: 0.123}.get(type(value))
    if isinstance(value, list):
        edited = value[::-1] or [7]
    elif value is None:
        edited = {}
    assert edited != value
    path.write_text(json.dumps({**record, key: edited}), "utf-8")
    assert _refused(path, seen, lm)


@pytest.mark.parametrize("key", KEYS)
def test_certificate_without_one_of_its_keys_is_rejected(
    path: Path, seen: Observation, lm: LanguageModel, key: str
) -> None:
    record = _read(path)
    del record[key]
    path.write_text(json.dumps(record), "utf-8")
    assert _refused(path, seen, lm)


def test_certificate_rejects_an_edit_deep_inside_the_evidence(path: Path, seen: Observation, lm: LanguageModel) -> None:
    record = _read(path)
    record["positions"][3]["runner_up"] = 1e9
    path.write_text(json.dumps(record), "utf-8")
    check = check_certificate(path, seen, lm)
    assert not check.holds
    assert "edited" in check.reasons[0]


@pytest.mark.parametrize("position", range(5))
def test_certificate_rejects_swapped_token(
    path: Path, seen: Observation, lm: LanguageModel, found: Inversion, position: int
) -> None:
    ids = list(found.input_ids)
    ids[position] = (ids[position] + 1) % 256
    _forge(path, input_ids=ids, text=lm.decode(ids))
    check = check_certificate(path, seen, lm)
    assert not check.holds
    assert check.largest_distance is not None
    assert check.tolerance is not None
    assert check.largest_distance > check.tolerance


def test_certificate_rejects_forged_text(path: Path, seen: Observation, lm: LanguageModel) -> None:
    _forge(path, text="I confess")
    check = check_certificate(path, seen, lm)
    assert check.reasons == ("the text is not what the claimed tokens decode to",)


def test_certificate_rejects_a_shorter_prompt(path: Path, seen: Observation, lm: LanguageModel) -> None:
    record = _read(path)
    _forge(path, input_ids=record["input_ids"][:-1], positions=record["positions"][:-1], seq_len=seen.seq_len - 1)
    assert not check_certificate(path, seen, lm).holds


@pytest.mark.parametrize("token_id", [260, -1, 10**30])
def test_certificate_rejects_an_id_outside_the_vocabulary(
    path: Path, seen: Observation, lm: LanguageModel, token_id: int
) -> None:
    record = _read(path)
    _forge(path, input_ids=[*record["input_ids"][:-1], token_id])
    assert not check_certificate(path, seen, lm).holds


def test_certificate_rejects_another_layer(path: Path, lm: LanguageModel) -> None:
    check = check_certificate(path, lm.capture(TEXT, layer=3), lm)
    assert not check.holds
    assert any("layer 2" in reason for reason in check.reasons)


def test_certificate_rejects_another_site(path: Path, lm: LanguageModel) -> None:
    assert not check_certificate(path, lm.capture(TEXT, site="final"), lm).holds


def test_certificate_rejects_a_layer_the_model_lacks(path: Path, seen: Observation, lm: LanguageModel) -> None:
    beyond = replace(seen, layer=99)
    _forge(path, layer=99, observation=beyond.digest())
    assert not check_certificate(path, beyond, lm).holds


def test_certificate_rejects_another_model(path: Path, seen: Observation) -> None:
    other = LanguageModel(tiny_model("llama", seed=11, vocab_size=260, num_hidden_layers=3))
    check = check_certificate(path, replace(seen, fingerprint=None), other)
    assert not check.holds
    assert any("fingerprint" in reason for reason in check.reasons)


def test_certificate_rejects_a_model_with_one_weight_changed(path: Path, seen: Observation, lm: LanguageModel) -> None:
    changed = copy_of(lm.model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-4
    assert not check_certificate(path, seen, LanguageModel(changed, lm.tokenizer)).holds


def test_replay_rejects_other_weights_under_a_forged_fingerprint(
    path: Path, seen: Observation, lm: LanguageModel
) -> None:
    changed = copy_of(lm.model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0] += 0.1
    other = LanguageModel(changed, lm.tokenizer)
    _forge(path, fingerprint=other.fingerprint)
    check = check_certificate(path, replace(seen, fingerprint=None), other)
    assert not check.holds
    assert "from the observed state" in check.reasons[0]


def test_certificate_rejects_an_edited_observation(path: Path, seen: Observation, lm: LanguageModel) -> None:
    states = seen.states.clone()
    states[1, 3] = torch.nextafter(states[1, 3], torch.tensor(1e9))
    check = check_certificate(path, replace(seen, states=states), lm)
    assert not check.holds
    assert "digest differs" in check.reasons[0]


def test_certificate_rejects_an_observation_of_another_width(path: Path, lm: LanguageModel) -> None:
    narrow = Observation(states=torch.ones(3, 8), layer=2)
    _forge(path, observation=narrow.digest(), input_ids=[1, 2, 3], seq_len=3)
    assert not check_certificate(path, narrow, lm).holds


def test_certificate_rejects_an_unmatched_record(lm: LanguageModel, seen: Observation, tmp_path: Path) -> None:
    broken = replace(seen, states=seen.states + 1)
    found = sipit.invert(lm, broken, policy="vocabulary")
    assert found.verdict == "unmatched"
    write_certificate(found, tmp_path / "c.json")
    check = check_certificate(tmp_path / "c.json", broken, lm)
    assert not check.holds
    assert check.verdict == "unmatched"


def test_unmatched_verdict_never_holds_even_over_the_right_tokens(
    path: Path, seen: Observation, lm: LanguageModel
) -> None:
    _forge(path, verdict="unmatched")
    check = check_certificate(path, seen, lm)
    assert not check.holds
    assert "unmatched" in check.reasons[0]


def test_certificate_of_an_ambiguous_search_holds_as_ambiguous(lm: LanguageModel, tmp_path: Path) -> None:
    seen = lm.capture("noisy", layer=2)
    noisy = Observation(states=seen.states + 0.001, layer=2)
    found = sipit.invert(lm, noisy, noise=0.01, policy="vocabulary")
    write_certificate(found, tmp_path / "c.json")
    check = check_certificate(tmp_path / "c.json", noisy, lm)
    assert (check.holds, check.verdict) == (True, "ambiguous")


@pytest.mark.parametrize("noise", [1e9, float("inf"), float("nan"), -1.0])
def test_forged_noise_does_not_buy_a_recovered_verdict(
    path: Path, seen: Observation, lm: LanguageModel, found: Inversion, noise: float
) -> None:
    ids = [found.input_ids[0], *reversed(found.input_ids[1:])]
    _forge(path, input_ids=ids, text=lm.decode(ids), noise=noise)
    assert _refused(path, seen, lm)


@pytest.mark.parametrize("noise", [float("inf"), float("nan"), -1.0])
def test_noise_that_is_no_distance_is_refused_in_any_certificate(
    path: Path, seen: Observation, lm: LanguageModel, found: Inversion, noise: float
) -> None:
    ids = [found.input_ids[0], *reversed(found.input_ids[1:])]
    _forge(path, input_ids=ids, text=lm.decode(ids), noise=noise, verdict="ambiguous")
    assert _refused(path, seen, lm)


def test_rounding_of_one_massive_coordinate_does_not_hide_a_swapped_token(tmp_path: Path) -> None:
    """Half a unit in the last place of 1,000 in bfloat16 is 2: more than all other coordinates differ by."""
    model = tiny_model("llama")
    rows = embedding_rows(model)
    rows.mul_(0.1)
    rows[:, 5] = 1000.0
    lm = LanguageModel(model)
    seen = lm.capture(input_ids=[4, 9, 16, 25], layer=0, dtype="bfloat16")
    found = sipit.invert(lm, seen, policy="vocabulary")
    assert (found.verdict, found.input_ids) == ("recovered", (4, 9, 16, 25))
    path = tmp_path / "c.json"
    write_certificate(found, path)
    assert check_certificate(path, seen, lm).holds
    _forge(path, input_ids=[4, 9, 17, 25])
    assert not check_certificate(path, seen, lm).holds
    _forge(path, verdict="ambiguous", noise=1e3)
    assert "declared noise" in check_certificate(path, seen, lm).reasons[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"{}",
        b'{"format": "sipit.certificate"}',
        b'{"format": "sipit.observation", "version": 1}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_malformed_certificate_is_an_error_of_its_own(
    content: bytes, seen: Observation, lm: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "certificate.json"
    path.write_bytes(content)
    with pytest.raises(CertificateError):
        check_certificate(path, seen, lm)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"verdict": "certain"},
        {"input_ids": ["a"]},
        {"input_ids": [1.5]},
        {"input_ids": [True]},
        {"input_ids": {}},
        {"layer": "2"},
        {"layer": 2.5},
        {"noise": "0"},
        {"text": 3},
        {"positions": None},
        {"positions": [{}]},
        {"seq_len": -1},
        {"seq_len": True},
        {"tolerance": "x"},
        {"tolerance": -1.0},
        {"seconds": None},
        {"calibration_block_tokens": -1},
        {"n_checked": 1.5},
        {"noise": 10**400},
        {"noise": -0.5},
        {"noise": True},
        {"policy": "guess"},
        {"text": "\ud800"},
        {"model": "\ud800"},
        {"miss": 3},
    ],
)
def test_certificate_with_a_value_of_the_wrong_kind_is_an_error(
    path: Path, seen: Observation, lm: LanguageModel, changes: dict[str, Any]
) -> None:
    _forge(path, **changes)
    with pytest.raises(CertificateError):
        check_certificate(path, seen, lm)


def test_certificate_that_is_missing_is_a_storage_error(seen: Observation, lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        check_certificate(tmp_path / "absent.json", seen, lm)
    with pytest.raises(StorageError, match="cannot read"):
        check_certificate(tmp_path, seen, lm)


def test_record_without_a_digest_is_a_certificate_error_not_a_key_error(
    found: Inversion, seen: Observation, lm: LanguageModel
) -> None:
    with pytest.raises(CertificateError):
        check_certificate(found.record(), seen, lm)
    with pytest.raises(CertificateError):
        check_certificate({}, seen, lm)


def test_certificate_without_a_tokenizer_claims_no_text(llama: LanguageModel, tmp_path: Path) -> None:
    seen = llama.capture(input_ids=[1, VOCAB - 1], layer=1)
    write_certificate(sipit.invert(llama, seen), tmp_path / "c.json")
    assert _read(tmp_path / "c.json")["text"] is None
    assert check_certificate(tmp_path / "c.json", seen, llama).holds


def test_certificate_is_plain_json_without_nan(path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert path.read_bytes().endswith(b"}\n")


def test_evidence_about_other_tokens_than_the_claimed_ones_does_not_hold(
    path: Path, seen: Observation, lm: LanguageModel
) -> None:
    positions = _read(path)["positions"]
    _forge(path, positions=[{**positions[0], "token_id": 3}, *positions[1:]])
    assert not check_certificate(path, seen, lm).holds


@pytest.mark.parametrize("noise", [1e3, 1e9, 1e300])
def test_declared_noise_that_covers_every_token_is_no_evidence(
    path: Path, seen: Observation, lm: LanguageModel, noise: float
) -> None:
    right = _read(path)["input_ids"]
    _forge(path, verdict="ambiguous", noise=noise, input_ids=right[::-1], text=lm.decode(right[::-1]))
    check = check_certificate(path, seen, lm)
    assert not check.holds
    assert "declared noise" in check.reasons[0]


def test_declared_noise_below_the_distance_of_other_tokens_holds(llama: LanguageModel, tmp_path: Path) -> None:
    seen = llama.capture(input_ids=[4, 90, 33], layer=2)
    error = torch.nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    noisy = replace(seen, states=seen.states + 0.01 * error)
    found = sipit.invert(llama, noisy, noise=0.011)
    assert (found.verdict, found.input_ids) == ("ambiguous", (4, 90, 33))
    write_certificate(found, tmp_path / "c.json")
    assert check_certificate(tmp_path / "c.json", noisy, llama).holds


def test_token_with_an_equal_row_cannot_be_left_out_of_a_certificate(tmp_path: Path) -> None:
    lm = LanguageModel(twin_model("llama", 4, 90))
    seen = lm.capture(input_ids=[7, 4, 33], layer=2)
    found = sipit.invert(lm, seen)
    assert found.verdict == "ambiguous"
    path = tmp_path / "c.json"
    write_certificate(found, path)
    assert check_certificate(path, seen, lm).holds
    _forge(path, verdict="recovered")
    assert not check_certificate(path, seen, lm).holds
    _forge(path, positions=[{**p, "rivals": []} for p in _read(path)["positions"]])
    assert "same embedding row" in check_certificate(path, seen, lm).reasons[0]
    others = [{"token_id": i, "token": None, "distance": 0.0} for i in range(100, 116)]
    _forge(path, verdict="ambiguous", positions=[{**p, "rivals": others} for p in _read(path)["positions"]])
    assert "same embedding row" in check_certificate(path, seen, lm).reasons[0]
