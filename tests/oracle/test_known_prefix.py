"""Rows behind a known prefix: the answer that all rows give, at the price of the rows and one pass of the prefix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sipit
from sipit import LanguageModel, Observation
from sipit.cli import main
from sipit.errors import InputError, OptionError
from sipit.inversion import certificate_of, invert_many
from sipit.observations import Site, read_observation, read_observations, write_observation, write_observations
from tests.tiny_models import random_ids

IDS = random_ids(14, seed=11)
SPLIT = 6


def _suffix(lm: LanguageModel, site: Site = "block", layer: int | None = 2) -> Observation:
    whole = lm.capture(input_ids=IDS, layer=layer, site=site)
    known = tuple(IDS[:SPLIT].tolist())
    return Observation(states=whole.states[SPLIT:], layer=whole.layer, site=site, known_prefix=known)


@pytest.mark.parametrize("site", ["block", "final", "kv", "logits"])
def test_a_suffix_comes_back_in_every_family(family_lm: LanguageModel, site: Site) -> None:
    seen = _suffix(family_lm, site, None if site in ("final", "logits") else 2)
    found = sipit.invert(family_lm, seen)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS[SPLIT:].tolist()))
    assert found.known_prefix == tuple(IDS[:SPLIT].tolist())
    assert sipit.check_certificate(certificate_of(found), seen, family_lm).holds


def test_an_array_behind_a_prefix_needs_no_observation(llama: LanguageModel) -> None:
    rows = llama.capture(input_ids=IDS, layer=2).states[SPLIT:]
    found = sipit.invert(llama, rows, layer=2, known_prefix=IDS[:SPLIT])
    assert found.input_ids == tuple(IDS[SPLIT:].tolist())
    assert len(found.positions) == len(rows)


def test_a_suffix_that_was_rounded_or_is_partial_comes_back(llama: LanguageModel) -> None:
    seen = _suffix(llama)
    step = seen.states.abs().amax(dim=1, keepdim=True) / 127
    half = (step / 2).expand_as(seen.states).contiguous()
    eighth = replace(seen, states=(seen.states / step).round() * step, half_step=half)
    logits = _suffix(llama, "logits", None)
    top = logits.states.topk(30, dim=1)
    few = torch.full(logits.states.shape, torch.inf).scatter(1, top.indices, 0.0)
    for rounded in (eighth, replace(logits, half_step=few)):
        found = sipit.invert(llama, rounded)
        assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS[SPLIT:].tolist()))
        assert sipit.check_certificate(certificate_of(found), rounded, llama).holds


def test_the_price_is_the_suffix_and_one_pass_of_the_prefix(llama: LanguageModel) -> None:
    ids = random_ids(90, seed=12)
    rows = llama.capture(input_ids=ids, layer=2).states[80:]
    hint = ids[80:].tolist()
    found = sipit.invert(llama, rows, layer=2, known_prefix=ids[:80], hint=hint, policy="vocabulary")
    assert found.input_ids == tuple(hint)
    assert found.block_tokens <= 2 * (len(ids) + len(hint))


def test_another_prefix_does_not_recover(llama: LanguageModel) -> None:
    seen = _suffix(llama)
    wrong = (*seen.known_prefix[:-1], (seen.known_prefix[-1] + 1) % llama.vocab_size)
    assert sipit.invert(llama, replace(seen, known_prefix=wrong)).verdict == "unmatched"


def test_a_certificate_does_not_hold_for_another_prefix(llama: LanguageModel) -> None:
    seen = _suffix(llama)
    record = certificate_of(sipit.invert(llama, seen))
    forged = {**record, "known_prefix": [(i + 1) % llama.vocab_size for i in record["known_prefix"]]}
    bare = replace(seen, known_prefix=(), positions=seen.positions)
    assert sipit.check_certificate(record, bare, llama).holds  # the record says what stands before the rows
    for observed in (seen, bare):
        assert not sipit.check_certificate(forged, observed, llama).holds


def test_a_shared_row_keeps_prefixes_apart(llama: LanguageModel) -> None:
    whole = [llama.capture(input_ids=random_ids(12, seed=seed), layer=2) for seed in range(4)]
    prompts = [random_ids(12, seed=seed).tolist() for seed in range(4)]
    cuts = (0, 3, 5, 8)
    seen = [
        Observation(states=w.states[n:], layer=2, known_prefix=tuple(ids[:n]))
        for w, ids, n in zip(whole, prompts, cuts, strict=True)
    ]
    found = list(invert_many(llama, seen))
    assert [f.verdict for f in found] == ["recovered"] * 4
    assert [list(f.input_ids) for f in found] == [ids[n:] for ids, n in zip(prompts, cuts, strict=True)]


def test_the_first_state_overflows_a_narrow_dtype_unseen(llama: LanguageModel) -> None:
    rows = llama.capture(input_ids=IDS, layer=2).states[SPLIT:].half()
    assert sipit.invert(llama, rows, layer=2, known_prefix=IDS[:SPLIT]).verdict == "recovered"


@pytest.mark.thorough
def test_rows_without_what_stands_before_them_say_so(llama: LanguageModel) -> None:
    seen = replace(_suffix(llama), known_prefix=())
    found = sipit.invert(llama, seen)
    assert (found.verdict, found.input_ids) == ("unmatched", ())
    assert found.miss is not None
    assert "no row is held at positions 0 to 5" in found.miss.diagnosis
    assert "pass the tokens before the first row" in found.miss.diagnosis


def test_a_known_prefix_that_cannot_be_is_refused(llama: LanguageModel) -> None:
    seen = replace(_suffix(llama), known_prefix=())
    with pytest.raises(InputError, match="outside the vocabulary"):
        sipit.invert(llama, seen, known_prefix=[1, 2, 3, 4, 5, 10_000])
    with pytest.raises(OptionError, match="which is another one"):
        sipit.invert(llama, _suffix(llama), known_prefix=[1, 2, 3, 4, 5, 6])


def test_files_keep_the_known_prefix(llama: LanguageModel, tmp_path: Path) -> None:
    seen = _suffix(llama)
    write_observation(seen, tmp_path / "one.safetensors")
    write_observations([seen, llama.capture(input_ids=IDS, layer=1)], tmp_path / "two.safetensors")
    back = [read_observation(tmp_path / "one.safetensors")]
    back += [observation for _, observation in read_observations(tmp_path / "two.safetensors")]
    assert [b.known_prefix for b in back] == [seen.known_prefix, seen.known_prefix, ()]
    assert back[0].positions == seen.positions
    assert torch.equal(back[1].states, seen.states)


@pytest.mark.thorough
def test_the_command_line_takes_text_ids_or_a_template(
    bos_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = sipit.load(str(bos_folder))
    message = [{"role": "user", "content": "What is it?"}]
    cases = {
        "text": (lm.encode("Secret: none of your business"), len(lm.encode("Secret: ")), ["--prefix-text", "Secret: "]),
        "ids": (lm.encode("abc def"), 3, ["--prefix-ids", ",".join(map(str, lm.encode("abc def")[:3].tolist()))]),
        "template": (lm.encode_chat(message), len(lm.encode_template_prefix()), ["--prefix-template"]),
    }
    for name, (ids, n_known, options) in cases.items():
        rows = lm.capture(input_ids=ids, layer=2).states[n_known:]
        path = tmp_path / f"{name}.safetensors"
        write_observation(Observation(states=rows, layer=2), path)
        assert main(["invert", str(path), "--model", str(bos_folder), *options]) == 0, name
        assert str(lm.decode(ids[n_known:])) in capsys.readouterr().out


def test_a_system_prompt_stands_before_the_message(bos_folder: Path) -> None:
    lm = sipit.load(str(bos_folder))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    known, whole = lm.encode_template_prefix("Be brief."), lm.encode_chat(messages)
    assert torch.equal(whole[: len(known)], known)
    assert len(known) > len(lm.encode_template_prefix())
