"""What the page shows, step by step, without a browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sipit
from sipit import LanguageModel
from sipit.errors import InputError, MismatchError
from sipit.inversion import check_certificate
from sipit.web.recovering import Asked, Shown, recovering

ASKED = Asked(text="a < b", file=None, layer="2", site="block", noise=0.0)


def _last(lm: LanguageModel, asked: Asked, folder: Path) -> Shown:
    return list(recovering(lm, asked, folder))[-1]


@pytest.mark.parametrize("layer", ["2", "final"])
def test_tokens_come_one_after_the_other_and_end_with_a_certificate(
    text_lm: LanguageModel, layer: str, tmp_path: Path
) -> None:
    shown = list(recovering(text_lm, replace(ASKED, layer=layer), tmp_path))
    counts = [one.tokens.count("<tr>") for one in shown]
    assert counts == sorted(counts)
    assert all(one.certificate is None for one in shown[:-1])
    last = shown[-1]
    assert last.status.startswith("**recovered**")
    assert "a &lt; b" in last.tokens
    assert last.certificate is not None
    site = "final" if layer == "final" else "block"
    seen = text_lm.capture("a < b", layer=None if layer == "final" else 2, site=site)  # type: ignore[arg-type]
    assert check_certificate(last.certificate, seen, text_lm).holds


def test_noise_makes_the_answer_a_matter_of_chance_and_the_page_says_so(text_lm: LanguageModel, tmp_path: Path) -> None:
    last = _last(text_lm, replace(ASKED, noise=0.01), tmp_path)
    assert last.status.startswith(("**probable**", "**ambiguous**"))
    assert "posterior" in last.tokens


@pytest.mark.thorough
def test_a_file_that_names_no_place_is_of_the_one_that_the_page_names(text_lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, text_lm.capture("from numpy", layer=2).states.numpy())
    asked = replace(ASKED, text="", file=path)
    assert "from numpy" in _last(text_lm, asked, tmp_path).tokens
    assert _last(text_lm, replace(asked, layer="1"), tmp_path).status.startswith("**unmatched**")


def test_the_last_state_alone_is_searched_for_as_such(text_lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "seen.safetensors"
    sipit.write_observation(text_lm.capture("ab", layer=2).last_rows(1), path)
    assert "<pre" in _last(text_lm, replace(ASKED, file=path), tmp_path).tokens


def test_what_cannot_be_asked_is_refused(text_lm: LanguageModel, llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text"):
        _last(text_lm, replace(ASKED, text=" "), tmp_path)
    path = tmp_path / "other.safetensors"
    sipit.write_observation(llama.capture(input_ids=[1, 2], layer=2), path)
    with pytest.raises(MismatchError):
        _last(text_lm, replace(ASKED, file=path), tmp_path)
