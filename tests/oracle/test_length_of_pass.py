"""Rotary embeddings that change with the length of the pass, against a freshly built model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PhimoeConfig

import sipit
from sipit import LanguageModel
from sipit.inversion.evidence.certificate import certificate_of
from sipit.inversion.invert import invert_many
from tests.tiny_models import random_ids, tiny_model, true_states, weights_digest

_LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def _long() -> Any:
    return tiny_model("phi3", rope_parameters=dict(_LONG), original_max_position_embeddings=64)


def _dynamic(seed: int = 0) -> Any:
    return tiny_model("llama", seed=seed, max_position_embeddings=8, rope_parameters=dict(_DYNAMIC))


@pytest.mark.thorough
@pytest.mark.parametrize("length", [64, 65, 80])
def test_long_rope_is_exact_on_both_sides_of_its_original_length(length: int) -> None:
    ids = random_ids(length, seed=3)
    truth = true_states(_long(), "phi3", ids)
    lm = LanguageModel(_long())
    found = sipit.invert(lm, truth[(2, "block")], layer=2)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids.tolist()))
    assert torch.equal(lm.capture(input_ids=ids, layer=2).states, truth[(2, "block")])
    assert sipit.invert(lm, truth[(4, "final")], site="final").input_ids == tuple(ids.tolist())


@pytest.mark.parametrize("seed", range(6))
def test_dynamic_rope_is_exact_beyond_its_length(seed: int) -> None:
    ids = random_ids(18, seed=3)
    states = true_states(_dynamic(seed), "llama", ids)[(1, "block")]
    found = sipit.invert(LanguageModel(_dynamic(seed)), states, layer=1)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids.tolist()))


@pytest.mark.thorough
@pytest.mark.parametrize(("make", "family", "lengths"), [(_dynamic, "llama", (20, 7, 13, 8)), (_long, "phi3", (70, 9))])
def test_a_long_pass_changes_no_later_one_and_nothing_in_the_callers_model(
    make: Any, family: str, lengths: tuple[int, ...]
) -> None:
    model = make()
    before = weights_digest(model)
    lm = LanguageModel(model)
    for length in lengths:
        ids = random_ids(length, seed=length)
        states = true_states(make(), family, ids)[(2, "block")]
        assert torch.equal(lm.capture(input_ids=ids, layer=2).states, states)
        assert sipit.invert(lm, states, layer=2).input_ids == tuple(ids.tolist())
    assert weights_digest(model) == before


def test_a_model_that_has_run_a_long_pass_already_is_taken_as_new() -> None:
    model, ids = _dynamic(), random_ids(12, seed=5)
    true_states(model, "llama", random_ids(40, seed=1))
    truth = true_states(_dynamic(), "llama", ids)[(2, "block")]
    assert torch.equal(LanguageModel(model).capture(input_ids=ids, layer=2).states, truth)


@pytest.mark.thorough
def test_many_lengths_together_and_their_certificates() -> None:
    lm = LanguageModel(_dynamic(1))
    prompts = [random_ids(length, seed=length) for length in (6, 18, 11, 18)]
    seen = [lm.capture(input_ids=ids, layer=2) for ids in prompts]
    found = invert_many(lm, seen)
    for ids, result, observed in zip(prompts, found, seen, strict=True):
        assert result.input_ids == tuple(ids.tolist())
        assert sipit.check_certificate(certificate_of(result), observed, lm).holds
    final, _ = lm.final_states(seen[1].states, 2, "block")
    assert torch.allclose(final, true_states(_dynamic(1), "llama", prompts[1])[(4, "final")], atol=1e-4)


def _phimoe() -> Any:
    long = {**_LONG, "short_mscale": 1.1, "long_mscale": 1.3}
    config = PhimoeConfig(
        vocab_size=150,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        initializer_range=0.25,
        pad_token_id=None,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        rope_parameters=long,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.thorough
@pytest.mark.parametrize("length", [64, 66])
def test_a_family_that_scales_its_angles_by_the_length_is_exact(length: int) -> None:
    ids = random_ids(length, seed=4)
    with torch.no_grad():
        states: Tensor = _phimoe()(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states[2][0]
    assert sipit.invert(LanguageModel(_phimoe()), states, layer=2).input_ids == tuple(ids.tolist())
