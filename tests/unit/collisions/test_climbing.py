"""A climb only ever comes closer, by distances of ordinary passes, between prompts that stay different."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel
from sipit.collisions.climbing import EDITS, Climb, Edit, climb
from sipit.errors import NonFiniteError, OptionError
from sipit.observations import Cut
from tests.tiny_models import embedding_rows, random_ids, tiny_model, true_states, twin_model

FIRST, SECOND = random_ids(6, seed=1), random_ids(6, seed=2)


def _climb(model: object, seed: int = 0, **options: object) -> Climb:
    lm = LanguageModel(model)  # type: ignore[arg-type]
    options = {"rounds": 5, "n_candidates": 32, **options}
    generator = torch.Generator().manual_seed(seed)
    return climb(lm, FIRST, SECOND, Cut(2, "block"), generator=generator, **options)  # type: ignore[arg-type]


def _true_gap(model: object, first: list[int], second: list[int]) -> tuple[float, float]:
    a, b = (_last(model, torch.tensor(ids)) for ids in (first, second))
    gap = float((a - b).norm())
    return gap, 2 * gap / float(a.norm() + b.norm())


def _last(model: object, ids: Tensor) -> Tensor:
    return true_states(model, "llama", ids)[Cut(2, "block")][-1].double()


@pytest.mark.parametrize("edits", [EDITS, *((edit,) for edit in EDITS)])
def test_each_step_is_a_true_distance_and_falls(edits: tuple[Edit, ...]) -> None:
    model = tiny_model("llama")
    found = _climb(model, edits=edits, max_growth=2)
    assert (found.steps[0].first_ids, found.steps[0].second_ids) == (FIRST.tolist(), SECOND.tolist())
    for step in found.steps:
        gap, relative = _true_gap(model, step.first_ids, step.second_ids)
        assert step.distance == pytest.approx(gap, rel=1e-3)
        assert step.relative_to_norm == pytest.approx(relative, rel=1e-3)
        assert step.first_ids != step.second_ids
        assert min(len(step.first_ids), len(step.second_ids)) > 0
        assert max(len(step.first_ids), len(step.second_ids)) <= 8
        assert all(0 <= i < 150 for i in step.first_ids + step.second_ids)
    relatives = [step.relative_to_norm for step in found.steps]
    assert relatives == sorted(set(relatives), reverse=True)
    assert (found.first_ids, found.distance) == (found.steps[-1].first_ids, found.steps[-1].distance)
    assert len(found.steps) > 1 or found.n_rounds == 3


def test_climb_comes_much_closer_than_it_began() -> None:
    found = _climb(tiny_model("llama"), rounds=12, n_candidates=64)
    assert found.relative_to_norm < found.steps[0].relative_to_norm / 4


def test_climb_finds_planted_equal_rows() -> None:
    lm = LanguageModel(twin_model("llama", 3, 9))
    first, second = torch.tensor([20, 3, 21]), torch.tensor([20, 40, 21])
    found = climb(lm, first, second, Cut(2, "block"), rounds=3, n_candidates=1500, edits=("swap",), sources=("random",))
    assert found.is_within
    assert found.is_equal
    assert (found.first_ids, found.second_ids) == ([20, 3, 21], [20, 9, 21])
    assert found.n_rounds < 3  # nothing is closer than equal


def test_shared_edits_keep_what_differs() -> None:
    found = _climb(tiny_model("llama"), edits=("insert_both",), max_growth=3)
    assert len(found.first_ids) == len(found.second_ids) == 6 + len(found.steps) - 1
    changed = [a != b for a, b in zip(found.first_ids, found.second_ids, strict=True)]
    assert sum(changed) == int((FIRST != SECOND).sum())


def test_same_seed_same_climb() -> None:
    model = tiny_model("llama")
    assert _climb(model, seed=4) == _climb(model, seed=4)
    assert _climb(model, seed=4).steps[1:] != _climb(model, seed=5).steps[1:]


def test_result_is_json_and_progress_is_told() -> None:
    steps: list[tuple[int, int]] = []
    found = _climb(tiny_model("llama"), rounds=2, on_step=lambda done, total: steps.append((done, total)))
    json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert steps == [(1, 2), (2, 2)]
    assert 0 < found.n_evaluated <= 64
    assert found.token_evaluations >= found.n_evaluated


def test_states_that_are_not_finite_are_refused_at_the_start_and_passed_over_later() -> None:
    model = tiny_model("llama")
    broken = [i for i in range(150) if i not in torch.arange(12) * 7919 % 150]
    embedding_rows(model)[broken] = float("inf")
    lm = LanguageModel(model)
    whole = torch.arange(12) * 7919 % 150
    found = climb(lm, whole[:4], whole[4:8], Cut(2, "block"), rounds=2, n_candidates=32, sources=("random",))
    assert found.distance < float("inf")
    with pytest.raises(NonFiniteError, match="not finite"):
        climb(lm, whole[:4], torch.tensor(broken[:1]), Cut(2, "block"))


def test_bad_options_are_refused() -> None:
    lm = LanguageModel(tiny_model("llama"))
    with pytest.raises(OptionError, match="same token ids"):
        climb(lm, FIRST, FIRST.clone(), Cut(2, "block"))
    for options in ({"rounds": -1}, {"n_candidates": 0}, {"edits": ()}, {"edits": ("turn",)}, {"sources": ("x",)}):
        with pytest.raises(OptionError):
            climb(lm, FIRST, SECOND, Cut(2, "block"), **options)
