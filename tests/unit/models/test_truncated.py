"""The cut costs no block above it and leaves the caller's model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sipit
from sipit import LanguageModel
from sipit.observations import Cut
from tests.tiny_models import N_LAYERS, blocks_of, random_ids, tiny_model, weights_digest

IDS = random_ids(8, seed=3)


def _runs(model: Any, run: Any) -> list[int]:
    """Return how often each block ran."""
    counts = [0] * N_LAYERS

    def counter(i: int) -> Any:
        def hook(*_: Any) -> None:
            counts[i] += 1

        return hook

    hooks = [block.register_forward_hook(counter(i)) for i, block in enumerate(blocks_of(model))]
    run()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("layer", range(N_LAYERS + 1))
def test_cut_runs_its_blocks_once_and_none_above(family_lm: LanguageModel, layer: int) -> None:
    cut = family_lm.cut(Cut(layer))
    expected = [1] * layer + [0] * (N_LAYERS - layer)
    assert _runs(family_lm.model, lambda: cut.ordinary(IDS)) == expected
    if family_lm.name != "gpt_neo":  # its packed blocks are clones, which hooks of the originals do not see
        assert _runs(family_lm.model, lambda: cut.row().run(IDS, torch.zeros(8).long())) == expected


def test_blocks_above_run_once_and_none_below(family_lm: LanguageModel) -> None:
    states = family_lm.capture(input_ids=IDS, layer=1).states
    assert _runs(family_lm.model, lambda: family_lm.final_states(states, 1, "block")) == [0, 1, 1, 1]


def test_language_model_head_is_not_run_by_a_capture(llama: LanguageModel) -> None:
    runs: list[int] = []
    hook = llama.model.lm_head.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr]
    llama.capture(input_ids=IDS, site="final")
    hook.remove()
    assert runs == []


def _portrait(model: Any) -> dict[str, Any]:
    """Return everything about a model that its owner could notice."""
    with torch.no_grad():
        output = model(input_ids=IDS[None], output_hidden_states=True)
    modules = dict(model.named_modules())
    return {
        "weights": weights_digest(model),
        "modules": {name: id(module) for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in modules.items()
        },
        "gradients": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "logits": output.logits.tolist(),
        "hidden_states": [h.tolist() for h in output.hidden_states],
    }


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "gemma3_text", "opt"])
def test_callers_model_is_left_as_it_was(family: str) -> None:
    model = tiny_model(family)
    before = _portrait(model)
    lm = LanguageModel(model, name=family)
    for policy in ("likely", "vocabulary", "gradient"):
        seen = lm.capture(input_ids=IDS[:3], layer=2)
        assert sipit.invert(lm, seen, policy=policy).verdict == "recovered"
    lm.final_states(lm.capture(input_ids=IDS, layer=1).states, 1, "block")
    assert _portrait(model) == before


def test_frozen_and_trainable_weights_stay_so() -> None:
    model = tiny_model("llama")
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    lm = LanguageModel(model, name="llama")
    sipit.invert(lm, lm.capture(input_ids=IDS[:2], layer=1), policy="gradient")
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)


def test_captured_states_carry_no_graph(llama: LanguageModel) -> None:
    assert not llama.capture(input_ids=IDS, layer=2).states.requires_grad


def test_truncating_to_more_than_is_held_changes_nothing(llama: LanguageModel) -> None:
    cut = llama.cut(Cut(2))
    row = cut.row()
    row.extend(IDS)
    row.truncate(100)
    assert row.length == 8
    assert row._cache.get_seq_length() == 8
