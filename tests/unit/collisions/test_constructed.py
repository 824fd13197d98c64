"""Constructions collide where they should and nowhere else, and the search sees what brute force sees."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from functools import cache

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel
from sipit.collisions.constructed import ConstructedCase, constructed_cases
from sipit.collisions.constructions import Construction, constructions_on, tiny_llama
from sipit.errors import OptionError
from sipit.models.families import module_at
from sipit.observations import Cut
from tests.tiny_models import tiny_model, weights_digest


@cache
def _cases() -> dict[str, ConstructedCase]:
    return {case.name: case for case in constructed_cases()}


@cache
def _constructions() -> dict[str, Construction]:
    return {one.name: one for build in constructions_on(tiny_llama(0), 0) for one in build()}


@torch.no_grad()
def _brute_states(one: Construction) -> list[Tensor]:
    """Return last-token states by the library's full forward pass, before the final norm, one length at a time."""
    model = one.lm.model
    norm = next(n for name in one.lm.family.final if (n := getattr(module_at(model, one.lm.family.trunk), name)))
    last: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    lengths = defaultdict(list)
    for number, ids in enumerate(one.prompts):
        lengths[len(ids)].append(number)
    found: dict[int, Tensor] = {}
    for numbers in lengths.values():
        output = model(input_ids=torch.stack([one.prompts[i] for i in numbers]), output_hidden_states=True)
        layer = one.cut[0]
        states = last.pop() if layer == one.lm.n_layers else output.hidden_states[layer]
        last.clear()
        found |= dict(zip(numbers, states[:, -1].double(), strict=True))
    hook.remove()
    return [found[i] for i in range(len(one.prompts))]


def test_every_case_turns_out_as_expected() -> None:
    wrong = [name for name, case in _cases().items() if case.found != (case.expected == "collides")]
    assert wrong == []
    assert {case.expected for case in _cases().values()} == {"collides", "does not"}


@pytest.mark.thorough
def test_cases_are_what_brute_force_finds() -> None:
    assert list(_constructions()) == list(_cases())
    for name, one in _constructions().items():
        case, states = _cases()[name], _brute_states(one)
        finite = [bool(torch.isfinite(state).all()) for state in states]
        pairs = [(i, j) for i, j in itertools.combinations(range(len(states)), 2) if finite[i] and finite[j]]
        gaps = [float((states[i] - states[j]).norm()) for i, j in pairs]
        assert (case.n_prompts, case.n_pairs, case.n_not_finite) == (len(states), len(gaps), finite.count(False)), name
        assert case.found == any(gap <= 1e-6 for gap in gaps), name
        if case.dtype == "float64":
            assert case.n_collisions == sum(gap <= 1e-6 for gap in gaps), name
            assert case.distance == pytest.approx(min(gaps), rel=1e-9, abs=1e-12), name
        assert len({tuple(ids.tolist()) for ids in one.prompts}) == len(one.prompts), name


def test_equal_rows_are_found_without_being_named() -> None:
    for layer in (1, 3):
        case = _cases()[f"equal rows, layer {layer}"]
        one = _constructions()[case.name]
        rows = one.lm.model.get_input_embeddings().weight  # type: ignore[operator]
        assert case.first_ids is not None
        assert case.second_ids is not None
        (changed,) = [(a, b) for a, b in zip(case.first_ids, case.second_ids, strict=True) if a != b]
        assert torch.equal(rows[changed[0]], rows[changed[1]])


def test_overflow_is_not_a_collision() -> None:
    case = _cases()["float16, overflow"]
    assert (case.n_not_finite, case.n_pairs, case.found) == (2, 94 * 93 // 2, False)


def test_each_order_of_the_prefix_collides_after_one_block_and_none_after_two() -> None:
    assert _cases()["equal positions, reordered prefix, layer 1"].n_collisions == 24 * 23 // 2
    assert _cases()["equal positions, reordered prefix, layer 2"].n_collisions == 0


def test_altered_states_reach_every_later_block() -> None:
    one = _constructions()["states of 4 bits, layer 1"]
    states = one.lm.tapped([Cut(layer) for layer in (1, 2, 3)]).states(one.prompts[0][None])
    for part in states:
        assert len(part.unique()) <= 15


def test_given_model_is_used_and_never_modified() -> None:
    lm = LanguageModel(tiny_model("qwen2").double(), name="given")
    before = weights_digest(lm.model)
    steps: list[tuple[int, int]] = []
    cases = constructed_cases(lm, on_step=lambda done, total: steps.append((done, total)))
    assert weights_digest(lm.model) == before
    assert "forward" not in vars(next(iter(lm.model.model.layers)))  # type: ignore[arg-type, union-attr]
    assert {case.layer for case in cases if case.name.startswith("control")} == {1, 4}
    assert all(case.found for case in cases if case.name.startswith("equal rows"))
    assert not any(case.found for case in cases if case.name.startswith("control"))
    assert steps == [(i, 7) for i in range(1, 8)]


def test_cases_are_json() -> None:
    json.dumps([dataclasses.asdict(case) for case in _cases().values()], allow_nan=False)


def test_model_too_small_is_refused() -> None:
    with pytest.raises(OptionError, match="3 layers"):
        constructed_cases(LanguageModel(tiny_model("llama", num_hidden_layers=2)))
