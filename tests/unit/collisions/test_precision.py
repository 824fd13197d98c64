"""Rounded weights lie on the grid they are said to lie on, in a copy, and the survey reports what follows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel
from sipit.collisions.precision import (
    PRECISIONS,
    Precision,
    float64_distances,
    in_float64,
    precision_survey,
    rounded_weight,
    with_rounded_weights,
)
from sipit.errors import OptionError
from sipit.observations import Cut
from tests.tiny_models import random_ids, tiny_model, true_states, weights_digest

PROMPTS = [random_ids(4 + i % 2, seed=i) for i in range(10)]


@pytest.mark.parametrize(("precision", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("outputs", [0, 1])
def test_each_output_channel_has_its_own_symmetric_grid(precision: Precision, levels: int, outputs: int) -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    weight[3] = 0.0
    given = weight if outputs == 0 else weight.T.contiguous()
    rounded = rounded_weight(given, precision, outputs=outputs)
    rounded = rounded if outputs == 0 else rounded.T
    for row, got in zip(weight.tolist(), rounded.tolist(), strict=True):
        step = max(map(abs, row)) / levels
        for value, new in zip(row, got, strict=True):
            assert abs(new - value) <= step / 2 * (1 + 1e-5)
            assert step == 0 or abs(new / step - round(new / step)) < 1e-4
            assert abs(new) <= max(map(abs, row)) * (1 + 1e-6)
        assert max(map(abs, got)) == pytest.approx(max(map(abs, row)), rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_only_linear_weights_of_a_copy_are_rounded(family: str) -> None:
    lm = LanguageModel(tiny_model(family))
    before = weights_digest(lm.model)
    rounded, error = with_rounded_weights(lm, "int4")
    assert weights_digest(lm.model) == before
    assert 0.02 < error < 0.2
    given, now = lm.model.state_dict(), rounded.model.state_dict()
    for name, value in given.items():
        in_block = any(part in name for part in (".h.", ".layers."))
        is_changed = in_block and value.ndim == 2
        assert torch.equal(value, now[name]) != is_changed, name
        if is_changed:  # no output channel holds more than 15 values
            channels = now[name].T if family == "gpt2" else now[name]
            scaled = channels / channels.abs().amax(dim=1, keepdim=True) * 7
            assert torch.allclose(scaled, scaled.round(), atol=1e-4), name


def test_weights_in_their_own_dtype_change_nothing() -> None:
    lm = LanguageModel(tiny_model("llama"))
    rounded, error = with_rounded_weights(lm, "float32")
    assert error == 0.0
    assert weights_digest(rounded.model) == weights_digest(lm.model)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_survey_is_what_brute_force_finds(precision: Precision) -> None:
    lm = LanguageModel(tiny_model("llama"))
    results = precision_survey(lm, PROMPTS, [Cut(2, "block"), Cut(4, "final")], precisions=(precision,))
    rounded, _ = with_rounded_weights(lm, precision)
    for result in results:
        states = [true_states(rounded.model, "llama", ids)[(result.layer, result.site)][-1].double() for ids in PROMPTS]
        gaps = {(i, j): float((states[i] - states[j]).norm()) for i, j in itertools.combinations(range(10), 2)}
        closest = min(gaps, key=lambda pair: gaps[pair])
        norm = statistics.fmean(float(state.norm()) for state in states)
        assert (result.first, result.second) == closest
        assert result.distance == pytest.approx(gaps[closest], rel=1e-4)
        assert result.relative_to_norm == pytest.approx(gaps[closest] / norm, rel=1e-4)
        median = statistics.median(gaps.values())
        assert result.relative_to_median == pytest.approx(gaps[closest] / median, rel=1e-4)
        assert (result.n_pairs, result.n_equal, result.n_collisions, result.median_is_exact) == (45, 0, 0, True)


def test_scale_free_distances_ignore_the_scale_of_the_states() -> None:
    """Doubling every state doubles the distance and leaves what is relative."""
    plain, doubled = tiny_model("llama"), tiny_model("llama")
    doubled.model.norm.weight.data *= 2.0
    one, two = (
        precision_survey(LanguageModel(m), PROMPTS, [Cut(4, "final")], precisions=["int8"])[0] for m in (plain, doubled)
    )
    assert one.distance is not None
    assert two.distance == pytest.approx(2 * one.distance, rel=1e-5)
    assert two.relative_to_median == pytest.approx(one.relative_to_median, rel=1e-5)
    assert two.relative_to_norm == pytest.approx(one.relative_to_norm, rel=1e-5)


def test_float64_tells_a_collision_from_a_close_pair() -> None:
    lm = LanguageModel(tiny_model("llama"))
    pairs = [(torch.tensor([7]), torch.tensor([7] * 9)), (PROMPTS[0], PROMPTS[1])]
    collided, apart = float64_distances(in_float64(lm), pairs, Cut(4, "block"))
    states = [true_states(lm.model, "llama", ids)[Cut(4, "block")][-1].double() for pair in pairs for ids in pair]
    assert collided < 1e-11 < float((states[0] - states[1]).norm())
    assert apart == pytest.approx(float((states[2] - states[3]).norm()), rel=1e-4)
    assert lm.dtype == torch.float32


def test_records_are_json_and_progress_reaches_its_end() -> None:
    steps: list[tuple[int, int]] = []
    lm = LanguageModel(tiny_model("gpt2"))
    results = precision_survey(lm, PROMPTS, [Cut(1, "block")], on_step=lambda done, total: steps.append((done, total)))
    json.dumps([dataclasses.asdict(result) for result in results], allow_nan=False)
    assert [result.precision for result in results] == ["float32", "bfloat16", "int8", "int4"]
    errors = [result.weight_error for result in results]
    assert errors[0] == 0.0 < errors[1] < errors[2] < errors[3]
    assert steps[-1] == (40, 40)


def test_repeated_prompts_and_unknown_precisions_are_refused() -> None:
    lm = LanguageModel(tiny_model("llama"))
    repeated: list[Tensor] = [PROMPTS[0], PROMPTS[1], PROMPTS[0].clone()]
    with pytest.raises(OptionError, match="same token ids"):
        precision_survey(lm, repeated, [Cut(1, "block")])
    with pytest.raises(OptionError, match="int3"):
        with_rounded_weights(lm, "int3")  # type: ignore[arg-type]
