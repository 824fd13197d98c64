"""States of a pass in another dtype: the search proposes in the model's, an ordinary pass in theirs decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sipit
from sipit.errors import MismatchError, OptionError
from sipit.inversion import SearchOptions, certificate_of, check_certificate, invert_many
from sipit.inversion.evidence.result import Miss, PositionEvidence
from sipit.inversion.judging.meter import Meter
from sipit.inversion.search import across_dtypes
from sipit.inversion.search.options import Progress
from sipit.models import LanguageModel, in_pass
from sipit.observations import Observation
from tests.tiny_models import tiny_model, twin_model

IDS = torch.tensor([5, 91, 17, 17, 3, 60, 44, 8])
FAMILIES = ("llama", "gpt2", "gemma3_text", "opt")
PASSES = ("bfloat16", "float16", "autocast-bfloat16", "autocast-float16")


def _model(family: str, seed: int = 0) -> LanguageModel:
    return LanguageModel(tiny_model(family, seed=seed), name=family)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_pass_is_recovered_in_float32_at_every_cut(family: str, name: str) -> None:
    lm = _model(family)
    other = in_pass(lm, name)
    for cut in ({"layer": 1}, {"layer": 2}, {"site": "final"}):
        seen = other.capture(input_ids=IDS, **cut)
        assert sipit.invert(lm, replace(seen, fingerprint=None)).verdict == "unmatched"  # float32 does not explain it
        found = sipit.invert(lm, seen, pass_dtype=name)
        assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
        assert (found.fingerprint, found.model_dtype) == (other.fingerprint, name)


@pytest.mark.parametrize("name", ["bfloat16", "autocast-bfloat16"])
def test_the_record_is_replayed_by_the_other_pass_and_by_no_other(name: str) -> None:
    lm = _model("llama")
    other = in_pass(lm, name)
    seen = other.capture(input_ids=IDS, layer=2)
    record = certificate_of(sipit.invert(lm, seen, pass_dtype=name))
    assert check_certificate(record, seen, other).holds
    assert not check_certificate(record, seen, lm).holds


@pytest.mark.parametrize("name", ["bfloat16", "autocast-bfloat16"])
@pytest.mark.parametrize("what", ["another model", "another layer", "another dtype", "a spliced row"])
def test_rows_of_something_else_are_unmatched(what: str, name: str) -> None:
    lm = _model("llama")
    leaking = in_pass(_model("llama", seed=3) if what == "another model" else lm, name)
    seen = leaking.capture(input_ids=IDS, layer=1 if what == "another layer" else 2)
    seen = replace(seen, fingerprint=None, layer=2)
    if what == "a spliced row":
        other = leaking.capture(input_ids=IDS.flip(0), layer=2).states
        seen = replace(seen, states=torch.cat([seen.states[:5], other[5:6], seen.states[6:]]))
    found = sipit.invert(lm, seen, pass_dtype="float16" if what == "another dtype" else name)
    assert found.verdict == "unmatched"
    assert found.miss is not None
    if what == "a spliced row":
        assert found.input_ids == tuple(IDS[:5].tolist())


def test_states_that_differ_by_more_than_usual_are_judged_by_their_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _model("llama")
    seen = in_pass(lm, "bfloat16").capture(input_ids=IDS, layer=2)
    monkeypatch.setattr(across_dtypes, "_WIDE", 0.1)  # so that every row is off by more
    monkeypatch.setattr(across_dtypes, "_WIDEST", 0.1)
    found = sipit.invert(lm, seen, pass_dtype="bfloat16")
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))


@pytest.mark.parametrize("name", ["bfloat16", "autocast-bfloat16"])
def test_where_the_nearest_token_is_a_wrong_one_the_vocabulary_is_tried_in_the_rows_own_arithmetic(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = _model("llama")
    seen = in_pass(lm, name).capture(input_ids=IDS, layer=2)
    monkeypatch.setattr(across_dtypes, "_WIDE", 0.1)  # so that every row is off by more
    monkeypatch.setattr(across_dtypes, "_WIDEST", 0.1)
    nearest = across_dtypes._nearest

    def wrong(lm: LanguageModel, miss: Miss) -> PositionEvidence:
        return replace(nearest(lm, miss), token_id=(miss.token_id + 1) % lm.vocab_size)

    monkeypatch.setattr(across_dtypes, "_nearest", wrong)
    found = sipit.invert(lm, seen, pass_dtype=name)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert certificate_of(found)["model_dtype"] == name


@pytest.mark.parametrize("width", [4.0, 0.1])  # as the search sees them, and as only their own pass does
def test_a_token_with_the_same_embedding_row_is_named(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(across_dtypes, "_WIDE", width)
    monkeypatch.setattr(across_dtypes, "_WIDEST", 4 * width)
    lm = LanguageModel(twin_model("llama", 17, 70), name="twins")
    seen = in_pass(lm, "bfloat16").capture(input_ids=IDS, layer=2)
    found = sipit.invert(lm, seen, pass_dtype="bfloat16")
    assert found.verdict == "ambiguous"
    shared = [{one.token_id, *(rival.token_id for rival in one.rivals)} for one in found.positions if one.rivals]
    assert shared == [{17, 70}, {17, 70}]


def test_a_known_prefix_and_many_observations_go_through() -> None:
    lm = _model("llama")
    other = in_pass(lm, "bfloat16")
    seen = other.capture(input_ids=IDS, layer=2)
    suffix = Observation(states=seen.states[3:], layer=2)
    found = sipit.invert(lm, suffix, known_prefix=IDS[:3], pass_dtype="bfloat16")
    assert found.input_ids == tuple(IDS[3:].tolist())
    both = list(invert_many(lm, [seen, suffix.behind(IDS[:3])], SearchOptions(pass_dtype="bfloat16")))
    assert [one.input_ids for one in both] == [tuple(IDS.tolist()), tuple(IDS[3:].tolist())]


def test_progress_is_that_of_the_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _model("llama")
    seen = in_pass(lm, "bfloat16").capture(input_ids=IDS, layer=2)
    monkeypatch.setattr(across_dtypes, "_WIDE", 0.1)
    monkeypatch.setattr(across_dtypes, "_WIDEST", 0.1)
    told: list[Progress] = []
    sipit.invert(lm, seen, pass_dtype="bfloat16", on_progress=told.append)
    assert {one.seq_len for one in told} == {len(IDS)}
    lengths = [len(one.input_ids) for one in told]
    assert lengths == sorted(lengths)
    assert all(one.input_ids == tuple(IDS[: len(one.input_ids)].tolist()) for one in told)


def test_the_same_dtype_is_the_ordinary_search() -> None:
    lm = _model("llama")
    seen = lm.capture(input_ids=IDS, layer=2)
    assert sipit.invert(lm, seen, pass_dtype="float32").fingerprint == lm.fingerprint


def test_holes_and_foreign_fingerprints_are_refused() -> None:
    lm = _model("llama")
    seen = in_pass(lm, "bfloat16").capture(input_ids=IDS, layer=2)
    holed = replace(seen, states=seen.states[::2], positions=(0, 2, 4, 6))
    with pytest.raises(OptionError, match="every position"):
        sipit.invert(lm, holed, pass_dtype="bfloat16")
    with pytest.raises(MismatchError, match="fingerprint"):
        sipit.invert(lm, seen, pass_dtype="float16")


def test_patience_ends_a_search_at_a_position() -> None:
    lm = _model("llama")
    seen = replace(lm.capture(input_ids=IDS, layer=1), layer=2)
    (found,) = invert_many(lm, [replace(seen, fingerprint=None)], SearchOptions(patience=16))
    assert found.miss is not None
    assert 16 <= found.miss.n_checked < lm.vocab_size
    assert "no more than" in found.miss.diagnosis


def test_the_pass_in_the_other_dtype_has_the_last_word() -> None:
    lm = _model("llama")
    other = in_pass(lm, "bfloat16")
    seen = replace(other.capture(input_ids=IDS, layer=1), fingerprint=None)
    off = across_dtypes.drift(lm, other, seen.cut, Meter()).half_steps(lm, seen)
    moved = replace(seen, states=lm.cut(seen.cut).ordinary(IDS) + 0.95 * off)  # as far as the search lets rows be off
    found = sipit.invert(lm, moved, pass_dtype="bfloat16")
    assert found.miss is not None
    assert "own pass in bfloat16 leaves more" in found.miss.diagnosis
