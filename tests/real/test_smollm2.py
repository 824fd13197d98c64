"""The pinned real model: recovered exactly at every depth, with a certificate that holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sipit
from sipit import LanguageModel
from sipit.inversion import check_certificate, write_certificate
from sipit.observations import Site

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]  # one worker prepares what they all need

TEXTS = [
    "Call me when you land.\n\n",  # trailing newlines
    "On naît 🦔 ici",
    "    return x == None\n",
]
PLACES: list[tuple[int, Site]] = [(1, "block"), (15, "block"), (30, "block"), (30, "final")]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return sipit.load("smollm2-135m", device="cpu")


def test_model_is_the_one_documented(lm: LanguageModel) -> None:
    assert (lm.n_layers, lm.d_model, lm.vocab_size, lm.dtype) == (30, 576, 49152, torch.float32)


@pytest.mark.parametrize(("layer", "site"), PLACES)
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_recovered_byte_for_byte(lm: LanguageModel, text: str, layer: int, site: Site) -> None:
    seen = lm.capture(text, layer=layer, site=site)
    found = sipit.invert(lm, seen)
    assert (found.verdict, found.text) == ("recovered", text)
    assert found.input_ids == tuple(lm.encode(text).tolist())
    assert all(p.runner_up is None or p.runner_up > 2 * p.tolerance for p in found.positions)


def test_capture_equals_output_hidden_states(lm: LanguageModel) -> None:
    ids = lm.encode(TEXTS[0])
    with torch.no_grad():
        output = lm.model(input_ids=ids[None], output_hidden_states=True)
    for layer in (0, 1, 15, 29):
        states = lm.capture(input_ids=ids, layer=layer).states
        torch.testing.assert_close(states, output.hidden_states[layer][0], rtol=1e-5, atol=1e-4)
    final = lm.capture(input_ids=ids, site="final").states
    torch.testing.assert_close(final, output.hidden_states[30][0], rtol=1e-5, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_states_are_recovered(lm: LanguageModel, dtype: str) -> None:
    found = sipit.invert(lm, lm.capture("Rounded to half", layer=15, dtype=dtype))
    assert (found.verdict, found.text) == ("recovered", "Rounded to half")


@pytest.mark.thorough
def test_chat_prompt_is_recovered_with_its_template(lm: LanguageModel) -> None:
    found = sipit.invert(lm, lm.capture("Hi", layer=15, chat=True))
    assert found.verdict == "recovered"
    assert found.text == lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.thorough
def test_random_ids_are_recovered(lm: LanguageModel) -> None:
    ids = torch.randint(lm.vocab_size, (6,), generator=torch.Generator().manual_seed(0))
    found = sipit.invert(lm, lm.capture(input_ids=ids, layer=15))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids.tolist()))


@pytest.mark.thorough
def test_certificate_holds_and_rejects_a_swapped_token(lm: LanguageModel, tmp_path: Path) -> None:
    seen = lm.capture(TEXTS[0], layer=15)
    found = sipit.invert(lm, seen)
    write_certificate(found, tmp_path / "right.json")
    assert check_certificate(tmp_path / "right.json", seen, lm).holds
    ids = list(found.input_ids)
    ids[2] += 1
    evidence = tuple(replace(p, token_id=i) for p, i in zip(found.positions, ids, strict=True))
    wrong = replace(found, input_ids=tuple(ids), text=lm.decode(ids), positions=evidence)
    write_certificate(wrong, tmp_path / "wrong.json")
    check = check_certificate(tmp_path / "wrong.json", seen, lm)
    assert not check.holds
    assert check.reasons[0].startswith("position ")


@pytest.mark.thorough
def test_special_tokens_with_nearly_equal_rows_are_told_apart_or_named_both(lm: LanguageModel) -> None:
    one, other = (lm.tokenizer.convert_tokens_to_ids(name) for name in ("<gh_stars>", "<issue_start>"))
    for right, wrong in ((one, other), (other, one)):
        seen = lm.capture(input_ids=[400, 260, right], layer=15, dtype="bfloat16")
        found = sipit.invert(lm, seen, hint=[400, 260, wrong])  # the wrong one is tried first
        last = found.positions[-1]
        assert last.token_id == right or right in [rival.token_id for rival in last.rivals]
        assert (found.verdict == "ambiguous") == any(p.rivals for p in found.positions)


@pytest.mark.thorough
def test_bfloat16_model_gives_the_prompt_back() -> None:
    coarse = sipit.load("smollm2-135m", dtype="bfloat16")
    text = "The invoice is unpaid."
    found = sipit.invert(coarse, coarse.capture(text, layer=3), use_fit=False)
    assert found.text == text
    assert found.positions[0].n_checked == coarse.vocab_size  # its tolerance is coarse there


@pytest.mark.thorough
@pytest.mark.parametrize("layer", [5, 15])
@pytest.mark.parametrize("token_id", [7, 12, 16])
def test_hardly_trained_first_tokens_are_named_and_what_follows_them_comes_back(
    lm: LanguageModel, token_id: int, layer: int
) -> None:
    ids = [token_id, *lm.encode(TEXTS[0])[:6].tolist()]
    found = sipit.invert(lm, lm.capture(input_ids=ids, layer=layer), use_fit=False)
    assert found.input_ids[1:] == tuple(ids[1:])
    first = found.positions[0]
    assert found.verdict == "ambiguous"
    assert token_id in {first.token_id, *(rival.token_id for rival in first.rivals)}
