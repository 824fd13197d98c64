"""Positions without a row are decoded by the next row, exactly or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sipit
from sipit import LanguageModel, Observation
from sipit.errors import MismatchError, OptionError
from sipit.inversion import certificate_of, check_certificate
from sipit.observations import Site
from tests.tiny_models import FAMILIES, random_ids, tiny_model, twin_model

IDS = random_ids(8, seed=5)
_MISSING = {"first": (0,), "middle": (3,), "every second": (1, 3, 5)}


def _without(seen: Observation, missing: tuple[int, ...]) -> Observation:
    held = [i for i in range(seen.seq_len) if i not in missing]
    return replace(seen, states=seen.states[held], positions=tuple(held))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("missing", ["first", "every second"])
def test_holes_are_filled_exactly(family: str, missing: str) -> None:
    lm = LanguageModel(tiny_model(family))
    found = sipit.invert(lm, _without(lm.capture(input_ids=IDS, layer=2), _MISSING[missing]))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert tuple(i for i, p in enumerate(found.positions) if not p.is_held) == _MISSING[missing]


@pytest.mark.parametrize("missing", _MISSING)
@pytest.mark.parametrize("site", ["block", "final", "kv", "logits"])
def test_holes_at_every_site(site: Site, missing: str) -> None:
    lm = LanguageModel(tiny_model("llama"))
    seen = lm.capture(input_ids=IDS, layer=None if site in ("final", "logits") else 2, site=site)
    found = sipit.invert(lm, _without(seen, _MISSING[missing]))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2))
def test_hole_is_filled_by_passes_of_few_tokens(seed: int) -> None:
    lm, ids = LanguageModel(tiny_model("llama")), random_ids(8, seed=seed)
    found = sipit.invert(lm, _without(lm.capture(input_ids=ids, layer=2), (3,)), max_batch=16)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids.tolist()))


def test_every_pair_of_a_vocabulary_of_bytes_is_run_before_a_hole_is_given_up(text_lm: LanguageModel) -> None:
    ids = text_lm.encode("every second row")[:14]  # the right pair is one of the last tried
    known = ids[:12].tolist()
    held = replace(text_lm.capture(input_ids=ids, layer=2), positions=())
    found = sipit.invert(text_lm, replace(held, states=held.states[13:], positions=(13,), known_prefix=tuple(known)))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids[12:].tolist()))


@pytest.mark.thorough
@pytest.mark.parametrize("site", ["block", "logits"])
def test_two_holes_together_are_filled_rightly_or_named_as_a_miss(site: Site) -> None:
    lm = LanguageModel(tiny_model("llama"))
    for seed in range(6):
        ids = random_ids(8, seed=seed)
        seen = lm.capture(input_ids=ids, layer=None if site == "logits" else 1, site=site)
        found = sipit.invert(lm, _without(seen, (4, 5)))
        assert found.input_ids == tuple(ids.tolist()[: len(found.input_ids)])
        assert (found.verdict == "recovered") == (len(found.input_ids) == 8)


def test_hole_agrees_with_ordinary_passes_of_every_token() -> None:
    lm = LanguageModel(tiny_model("llama"))
    seen = lm.capture(input_ids=IDS, layer=1)
    found = sipit.invert(lm, _without(seen, (3,)))
    rows = []
    for token in range(lm.vocab_size):
        ids = IDS.clone()
        ids[3] = token
        rows.append(lm.capture(input_ids=ids, layer=1).states[4])
    distances = (torch.stack(rows) - seen.states[4]).norm(dim=1)
    assert int(distances.argmin()) == found.input_ids[3]
    assert int((distances <= found.positions[3].tolerance).sum()) == 1


@pytest.mark.thorough
def test_hole_behind_a_known_prefix_and_before_its_rows() -> None:
    lm = LanguageModel(tiny_model("llama"))
    seen = lm.capture(input_ids=IDS, layer=2)
    held = replace(seen, states=seen.states[4:], positions=tuple(range(4, 8)))
    found = sipit.invert(lm, held, known_prefix=IDS[:3].tolist())
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS[3:].tolist()))
    assert found.seq_len == 5


def test_twins_in_a_hole_are_named() -> None:
    lm = LanguageModel(twin_model("llama", int(IDS[3]), 149))
    found = sipit.invert(lm, _without(lm.capture(input_ids=IDS, layer=2), (3,)))
    assert found.verdict == "ambiguous"
    assert {found.input_ids[3], found.positions[3].rivals[0].token_id} == {int(IDS[3]), 149}


def test_rows_of_another_prompt_behind_a_hole_are_a_miss() -> None:
    lm = LanguageModel(tiny_model("llama"))
    seen, other = (lm.capture(input_ids=ids, layer=2) for ids in (IDS, random_ids(8, seed=6)))
    spliced = replace(seen, states=torch.cat([seen.states[:3], other.states[3:]]))
    found = sipit.invert(lm, _without(spliced, (3,)))
    assert found.verdict == "unmatched"
    assert found.miss is not None
    assert found.miss.position == 3
    assert "no row is held at position 3" in found.miss.diagnosis


@pytest.mark.thorough
def test_certificate_of_holes_holds_and_a_changed_one_does_not() -> None:
    lm = LanguageModel(tiny_model("llama"))
    held = _without(lm.capture(input_ids=IDS, layer=2), (1, 3, 5))
    found = sipit.invert(lm, held)
    assert check_certificate(certificate_of(found), held, lm).holds
    silent = replace(held, positions=())  # as a file gives it that names no positions
    assert check_certificate(certificate_of(found), silent, lm).holds
    ids = (*found.input_ids[:3], (found.input_ids[3] + 1) % 150, *found.input_ids[4:])
    evidence = tuple(replace(p, token_id=i) for p, i in zip(found.positions, ids, strict=True))
    forged = replace(found, input_ids=ids, positions=evidence, text=lm.decode(ids))
    assert not check_certificate(certificate_of(forged), held, lm).holds
    moved = tuple(replace(p, is_held=not p.is_held) for p in found.positions)
    assert not check_certificate(certificate_of(replace(found, positions=moved)), held, lm).holds


def test_holes_need_a_block_and_the_policy_that_reads_ahead() -> None:
    lm = LanguageModel(tiny_model("llama"))
    with pytest.raises(MismatchError, match="no row tells of another"):
        sipit.invert(lm, _without(lm.capture(input_ids=IDS, layer=0), (3,)))
    with pytest.raises(OptionError, match="reads no row ahead"):
        sipit.invert(lm, _without(lm.capture(input_ids=IDS, layer=2), (3,)), policy="vocabulary")
