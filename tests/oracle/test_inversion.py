"""Inversion on every family, and its evidence against brute force over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sipit
from sipit import LanguageModel
from sipit.inversion import Policy
from sipit.models.pass_cost import tokens_a_pass
from sipit.models.plain_pass import plain_seconds
from sipit.observations import Site
from tests.tiny_models import N_LAYERS, VOCAB, blocks_of, random_ids, text_model, tiny_model, true_states

POLICIES: tuple[Policy, ...] = ("auto", "likely", "vocabulary", "random")
IDS = random_ids(9, seed=2)


def _recovers(lm: LanguageModel, layer: int, site: Site, policy: Policy) -> None:
    states = true_states(lm.model, lm.name, IDS)[(layer, site)]  # from the library, not from capture()
    found = sipit.invert(lm, states, layer=layer, site=site, policy=policy)
    assert found.input_ids == tuple(IDS.tolist())
    assert found.verdict == "recovered"
    assert all(p.distance <= p.tolerance for p in found.positions)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_recovers_random_ids_at_the_middle(family_lm: LanguageModel, policy: Policy) -> None:
    _recovers(family_lm, N_LAYERS // 2, "block", policy)


@pytest.mark.parametrize("policy", ["likely", "vocabulary"])
@pytest.mark.parametrize("layer", [0, 1, N_LAYERS])
def test_random_ids_are_recovered_at_every_depth(family_lm: LanguageModel, layer: int, policy: Policy) -> None:
    _recovers(family_lm, layer, "block", policy)


def test_random_ids_are_recovered_after_the_final_norm(family_lm: LanguageModel) -> None:
    _recovers(family_lm, N_LAYERS, "final", "likely")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_gradient_policy_recovers_random_ids(family: str, layer: int) -> None:
    _recovers(LanguageModel(tiny_model(family), name=family), layer, "block", "gradient")


@pytest.mark.parametrize("site", ["block", "final"])
def test_exhaustive_runner_up_is_the_minimum_over_the_vocabulary(family_lm: LanguageModel, site: Site) -> None:
    layer = 3 if site == "block" else N_LAYERS
    ids = IDS[:6]
    seen = family_lm.capture(input_ids=ids, layer=layer, site=site)
    found = sipit.invert(family_lm, seen, policy="vocabulary", exhaustive=True)
    assert found.input_ids == tuple(ids.tolist())
    for position, evidence in enumerate(found.positions):
        prompts = ids[: position + 1].repeat(VOCAB, 1)
        prompts[:, position] = torch.arange(VOCAB)
        states = true_states(family_lm.model, family_lm.name, prompts)[(layer, site)][:, position]  # (V, D)
        distances = (states - seen.states[position]).norm(dim=1)
        distances[ids[position]] = float("inf")
        assert evidence.runner_up == pytest.approx(float(distances.min()), rel=1e-3)
        assert evidence.margin == pytest.approx(float(distances.min()), rel=1e-2)


@pytest.mark.parametrize("policy", POLICIES)
def test_exhaustive_search_checks_each_token_of_the_vocabulary_once(llama: LanguageModel, policy: Policy) -> None:
    found = sipit.invert(llama, llama.capture(input_ids=IDS[:4], layer=2), policy=policy, exhaustive=True)
    assert [p.n_checked for p in found.positions] == [VOCAB] * 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", [1, 3])
def test_block_tokens_equal_tokens_counted_inside_the_blocks(policy: Policy, layer: int) -> None:
    lm = text_model(bos=False, layers=N_LAYERS)
    seen = lm.capture("count me", layer=layer)
    sipit.invert(lm, seen, policy=policy)  # whatever is measured once per model is paid here
    counted: list[int] = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[0] * inputs[0].shape[1]))
        for block in blocks_of(lm.model)
    ]
    found = sipit.invert(lm, seen, policy=policy)
    for hook in hooks:
        hook.remove()
    assert found.text == "count me"
    assert found.block_tokens == sum(counted)
    assert found.prefill_ratio == pytest.approx(found.block_tokens / (seen.seq_len * layer))


def test_gradient_cost_counts_a_backward_pass_as_two_more() -> None:
    lm = LanguageModel(tiny_model("llama"), name="llama")
    seen = lm.capture(input_ids=IDS[:3], layer=2)
    sipit.invert(lm, seen, policy="vocabulary")
    counted = {True: 0, False: 0}  # with a gradient, or without

    def count(_: Any, inputs: Any, __: Any) -> None:
        counted[torch.is_grad_enabled()] += inputs[0].shape[1]

    hooks = [block.register_forward_hook(count) for block in blocks_of(lm.model)]
    found = sipit.invert(lm, seen, policy="gradient")
    for hook in hooks:
        hook.remove()
    assert found.verdict == "recovered"
    assert found.block_tokens == counted[False] + 3 * counted[True]


def test_calibration_cost_equals_tokens_counted_inside_the_blocks() -> None:
    lm = LanguageModel(tiny_model("llama"), name="llama")
    seen = lm.capture(input_ids=IDS, layer=2)
    plain_seconds(lm, seen.cut, len(IDS))  # what wall_ratio is over: measured once, and no part of the search
    tokens_a_pass(lm)  # of this machine, too
    counted: list[int] = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[1]))
        for block in blocks_of(lm.model)
    ]
    found = sipit.invert(lm, seen, policy="vocabulary")
    for hook in hooks:
        hook.remove()
    assert found.block_tokens + found.calibration_block_tokens == sum(counted)


def test_layer_zero_costs_no_block_and_divides_by_the_prompt(llama: LanguageModel) -> None:
    found = sipit.invert(llama, llama.capture(input_ids=IDS, layer=0), policy="vocabulary")
    assert found.block_tokens == 0
    assert found.prefill_ratio == 0


def test_n_checked_adds_up_over_the_positions(llama: LanguageModel) -> None:
    found = sipit.invert(llama, llama.capture(input_ids=IDS, layer=2), policy="vocabulary")
    assert found.n_checked == sum(p.n_checked for p in found.positions)
    for token_id, evidence in zip(IDS.tolist(), found.positions, strict=True):
        assert token_id < evidence.n_checked <= VOCAB  # by rising id, each token at most once


@pytest.mark.parametrize("seed", range(4))
def test_noise_below_half_the_margin_keeps_the_tokens(llama: LanguageModel, seed: int) -> None:
    """Theorem 3.2: the nearest token is the right one if the error is less than half the one-step margin."""
    seen = llama.capture(input_ids=IDS, layer=2)
    exact = sipit.invert(llama, seen, policy="vocabulary", exhaustive=True)
    margin = min(p.margin for p in exact.positions if p.margin is not None)
    error = torch.randn(seen.states.shape, generator=torch.Generator().manual_seed(seed))
    error *= 0.49 * margin / error.norm(dim=1, keepdim=True)
    noisy = sipit.invert(llama, seen.states + error, layer=2, noise=0.5 * margin, policy="vocabulary")
    assert noisy.input_ids == tuple(IDS.tolist())
    assert noisy.verdict == "ambiguous"
    assert sipit.invert(llama, seen.states + error, layer=2, policy="vocabulary").verdict == "unmatched"
