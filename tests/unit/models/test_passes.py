"""The model as another pass computes it: as torch itself does under autocast, and without touching the caller's."""

from __future__ import annotations

import pytest
import torch

from sipit.errors import OptionError
from sipit.inversion.judging import noise
from sipit.inversion.judging.noise import noise_floor
from sipit.models import LanguageModel, in_pass
from sipit.observations import Cut
from tests.tiny_models import random_ids, tiny_model

IDS = random_ids(9, seed=4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pass_under_autocast_gives_the_states_that_torch_gives(family: str, dtype: torch.dtype) -> None:
    lm = LanguageModel(tiny_model(family), name=family)
    other = in_pass(lm, f"autocast-{str(dtype).removeprefix('torch.')}")
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = lm.model(IDS[None], output_hidden_states=True)
    for layer in (1, 2):
        assert torch.equal(other.capture(input_ids=IDS, layer=layer).states, expected.hidden_states[layer][0])
        assert not torch.equal(lm.capture(input_ids=IDS, layer=layer).states, expected.hidden_states[layer][0])
    assert torch.equal(other.capture(input_ids=IDS, site="logits").states, expected.logits[0])


def test_the_callers_model_computes_as_before_and_shares_its_weights() -> None:
    lm = LanguageModel(tiny_model("llama"), name="llama")
    before, kind = lm.capture(input_ids=IDS, layer=2).states, type(lm.model)
    other = in_pass(lm, "autocast-bfloat16")
    assert torch.equal(lm.capture(input_ids=IDS, layer=2).states, before)
    assert type(lm.model) is kind
    assert (lm.arithmetic, other.arithmetic, other.dtype) == ("float32", "autocast-bfloat16", torch.float32)
    assert other.fingerprint == lm.fingerprint
    pairs = zip(lm.model.parameters(), other.model.parameters(), strict=True)
    assert all(own is theirs for own, theirs in pairs)


def test_each_arithmetic_has_a_noise_floor_of_its_own_in_the_next_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = tiny_model("llama"), ("float32", "autocast-bfloat16")
    first = [noise_floor(in_pass(LanguageModel(model, name="one"), name), Cut(2)) for name in names]
    monkeypatch.setattr(noise, "_measure", None)  # from here on they are read from the cache
    assert [noise_floor(in_pass(LanguageModel(model, name="two"), name), Cut(2)) for name in names] == first
    assert first[1].rest > 100 * first[0].rest


def test_a_pass_is_made_once_and_one_without_a_name_is_refused() -> None:
    lm = LanguageModel(tiny_model("llama"), name="llama")
    assert in_pass(lm, "float32") is lm
    assert in_pass(lm, "bfloat16") is in_pass(lm, "bfloat16")
    with pytest.raises(OptionError, match="autocast-bfloat16"):
        in_pass(lm, "bf16")
