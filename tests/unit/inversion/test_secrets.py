"""States behind a secret rotation, or mixed with one another, still give the prompt away; others do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel, Observation
from sipit.errors import OptionError
from sipit.inversion.judging.meter import Meter
from sipit.inversion.secrets import Followed, InSpan, UpToRotation, follow
from tests.tiny_models import FAMILIES, random_ids, tiny_model

IDS = random_ids(8, seed=3)


def _rotated(seen: Observation, seed: int = 1) -> Observation:
    drawn = torch.randn(seen.d_model, seen.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return replace(seen, states=(seen.states.double() @ torch.linalg.qr(drawn).Q).to(seen.states.dtype))


def _mixed(seen: Observation, n_shields: int, seed: int = 1) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    shields = 3 * torch.randn(n_shields, seen.d_model, generator=generator)
    both = torch.cat([seen.states.float(), shields])
    mixture = torch.randn(len(both), len(both), generator=generator)
    return replace(seen, states=(mixture @ both).to(seen.states.dtype), positions=())


def _follow(lm: LanguageModel, seen: Observation, n_tokens: int, *, is_mixed: bool) -> Followed:
    relation = InSpan(lm, seen) if is_mixed else UpToRotation(lm, seen)
    return follow(lm, seen.cut, relation, n_tokens, Meter())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [1, 3])
def test_rotated_rows_give_the_prompt_away(family: str, layer: int) -> None:
    lm = LanguageModel(tiny_model(family))
    found = _follow(lm, _rotated(lm.capture(input_ids=IDS, layer=layer)), len(IDS), is_mixed=False)
    assert found.prompts == (tuple(IDS.tolist()),)
    assert found.excess < 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_shields", [0, 5])
def test_mixed_rows_give_the_prompt_away(family: str, n_shields: int) -> None:
    lm = LanguageModel(tiny_model(family))
    found = _follow(lm, _mixed(lm.capture(input_ids=IDS, layer=2), n_shields), len(IDS), is_mixed=True)
    assert found.prompts == (tuple(IDS.tolist()),)


def test_a_token_that_repeats_in_a_mixture_is_followed(llama: LanguageModel) -> None:
    """Its states are one where positions are rotary and nothing stands before it, so the rows are dependent."""
    ids = [5, 5, 9]
    found = _follow(llama, _mixed(llama.capture(input_ids=ids, layer=2), 0), 3, is_mixed=True)
    assert tuple(ids) in found.prompts


@pytest.mark.parametrize("is_mixed", [False, True])
def test_rows_of_another_model_or_layer_agree_with_nothing(llama: LanguageModel, is_mixed: bool) -> None:
    other = LanguageModel(tiny_model("llama", seed=9))
    wrong = [other.capture(input_ids=IDS, layer=2), replace(llama.capture(input_ids=IDS, layer=3), layer=2)]
    for seen in wrong:
        given = replace(_mixed(seen, 2) if is_mixed else _rotated(seen), fingerprint=None)
        assert _follow(llama, given, len(IDS), is_mixed=is_mixed).prompts == ()


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_foreign_row_ends_the_prompt_there(llama: LanguageModel, is_mixed: bool) -> None:
    seen = llama.capture(input_ids=IDS, layer=2)
    states: Tensor = seen.states.clone()
    states[5] = torch.randn(seen.d_model, generator=torch.Generator().manual_seed(2))
    given = replace(seen, states=states)
    found = _follow(llama, _mixed(given, 0) if is_mixed else _rotated(given), len(IDS), is_mixed=is_mixed)
    assert (found.prompts, found.position) == ((), 5)


def test_as_many_mixed_rows_as_they_are_wide_say_nothing(llama: LanguageModel) -> None:
    with pytest.raises(OptionError, match="span all states"):
        InSpan(llama, _mixed(llama.capture(input_ids=IDS, layer=2), llama.d_model - len(IDS)))
