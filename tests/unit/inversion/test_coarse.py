"""Where arithmetic is coarse, the first token that fits is not taken for the right one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sipit
from sipit import LanguageModel
from sipit.errors import ModelError
from sipit.inversion.judging import check as check_module
from sipit.inversion.judging import noise as noise_module
from sipit.inversion.judging import tolerance
from sipit.inversion.search import beside as beside_module
from sipit.inversion.search import first_states as first_states_module
from sipit.models.embeddings import EmbeddingRows
from sipit.observations import Cut
from tests.tiny_models import VOCAB, random_ids, tiny_model

LAYER = 2
RIGHT, NEAR = 90, 20  # NEAR comes first by id
IDS = torch.tensor([*random_ids(5, seed=4).tolist(), RIGHT, 7])


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model with two tokens whose states lie near, and noise that is not far below the usual gap."""
    model = tiny_model("llama")
    rows = model.get_input_embeddings().weight.data
    rows[NEAR] = rows[RIGHT] + 0.01 * rows[NEAR]
    lm = LanguageModel(model, name="llama")
    floor = noise_module.NoiseFloor(first=1e-6, rest=0.04, first_gap=0.5, rest_gap=0.5, block_tokens=0)
    monkeypatch.setitem(lm._derived, ("noise floor", Cut(LAYER), 0), floor)
    return lm


def test_nearest_of_the_tokens_alike_is_accepted(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = lm.capture(input_ids=IDS, layer=LAYER)
    found = sipit.invert(lm, seen, policy="vocabulary")
    assert found.input_ids == tuple(IDS.tolist())
    assert found.positions[5].n_checked > NEAR + 1
    monkeypatch.setattr(beside_module, "_RIVALS", 0)
    monkeypatch.setattr(EmbeddingRows, "within", lambda *_, **__: [])
    wrong = sipit.invert(lm, seen, policy="vocabulary", max_batch=16)
    assert wrong.input_ids[5] == NEAR  # else this test shows nothing


def test_own_noise_of_the_nearest_tells_it_from_rivals(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = lm.capture(input_ids=IDS, layer=LAYER)
    found = sipit.invert(lm, seen, policy="vocabulary")
    assert found.verdict == "recovered"
    evidence = found.positions[5]
    assert evidence.distance <= evidence.tolerance < tolerance.tolerance_for(lm, seen).total[5]
    assert evidence.runner_up is not None
    assert evidence.tolerance < evidence.runner_up
    monkeypatch.setattr(check_module.PackedCheck, "own_limit", lambda *_: torch.inf)
    doubtful = sipit.invert(lm, seen, policy="vocabulary")
    assert doubtful.verdict == "ambiguous"
    assert [r.token_id for r in doubtful.positions[5].rivals] == [NEAR]


def test_declared_noise_keeps_the_rivals_within_it(lm: LanguageModel) -> None:
    seen = lm.capture(input_ids=IDS, layer=LAYER)
    gap = sipit.invert(lm, seen, policy="vocabulary").positions[5].runner_up
    assert gap is not None
    noisy = sipit.invert(lm, seen, policy="vocabulary", noise=2 * gap)
    assert noisy.verdict == "ambiguous"
    assert [r.token_id for r in noisy.positions[5].rivals] == [NEAR]


def test_coarse_first_position_is_judged_over_the_whole_vocabulary(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = noise_module.NoiseFloor(first=0.04, rest=1e-6, first_gap=0.5, rest_gap=0.5, block_tokens=0)
    monkeypatch.setitem(lm._derived, ("noise floor", Cut(LAYER), 0), floor)
    found = sipit.invert(lm, lm.capture(input_ids=IDS, layer=LAYER))
    assert found.input_ids == tuple(IDS.tolist())
    assert found.positions[0].n_checked == VOCAB


@given(noise=st.floats(1e-9, 10), gap=st.floats(1e-9, 10))
def test_tolerance_covers_the_noise_and_stops_short_of_wrong_tokens(noise: float, gap: float) -> None:
    allowed = tolerance._allowed(noise, gap)
    assert noise < allowed <= noise_module.SAFETY * noise
    if 4 * noise <= gap:
        assert allowed <= 0.51 * gap
    if noise_module.SAFETY * noise <= noise_module.CLEAR * gap:
        assert allowed == noise_module.SAFETY * noise


def test_noise_as_large_as_the_gap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LanguageModel(tiny_model("llama"), name="llama")
    monkeypatch.setattr(
        noise_module,
        "_packed_distances",
        lambda _cut, ids, expected, _lm, _shapes: (
            0.6 * expected.norm(dim=1).cpu() * (torch.arange(len(ids)) == 1),
            expected.norm(dim=1).cpu(),
            torch.ones(len(ids)),
            0,
        ),
    )
    with pytest.raises(ModelError, match="too coarse"):
        noise_module.noise_floor(lm, Cut(LAYER, "block"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_bfloat16_model_never_takes_a_wrong_prompt_for_recovered(family: str) -> None:
    lm = LanguageModel(tiny_model(family).bfloat16(), name=family)
    for seed in range(3):
        ids = random_ids(8, seed=seed)
        found = sipit.invert(lm, lm.capture(input_ids=ids, layer=3))
        assert found.input_ids == tuple(ids.tolist())
        assert found.verdict in ("recovered", "ambiguous")


def _in_whole_steps(lm: LanguageModel, ids: torch.Tensor, layer: int) -> sipit.Observation:
    """The states of a prompt in whole steps, a step a row, the first of them so wide that it may hold others."""
    seen = lm.capture(input_ids=ids, layer=layer)
    step = seen.states.abs().amax(dim=1, keepdim=True) / 2
    half = (step / 2).expand_as(seen.states).contiguous()
    return replace(seen, states=(seen.states / step).round() * step, half_step=half)


def test_first_states_that_one_prompt_ran_are_read_by_the_next() -> None:
    lm = LanguageModel(tiny_model("llama"), name="llama")
    first, second = (_in_whole_steps(lm, random_ids(6, seed=seed), LAYER) for seed in (1, 2))
    fresh = sipit.invert(LanguageModel(tiny_model("llama"), name="llama"), second)
    before = sipit.invert(lm, first)
    after = sipit.invert(lm, second)
    assert before.positions[0].n_checked == after.positions[0].n_checked == VOCAB
    assert after.n_checked <= fresh.n_checked - VOCAB + 1
    assert (after.verdict, after.input_ids) == (fresh.verdict, fresh.input_ids)
    assert [p.token_id for p in after.positions[0].rivals] == [p.token_id for p in fresh.positions[0].rivals]


def test_first_states_are_kept_apart_by_cut_and_not_read_behind_a_known_prefix() -> None:
    lm = LanguageModel(tiny_model("llama"), name="llama")
    ids = random_ids(6, seed=1)
    sipit.invert(lm, _in_whole_steps(lm, ids, LAYER))
    deeper = sipit.invert(lm, _in_whole_steps(lm, ids, LAYER + 1))
    assert deeper.n_checked >= VOCAB
    seen = _in_whole_steps(lm, ids, LAYER)
    assert seen.half_step is not None
    rest = replace(seen, states=seen.states[1:], half_step=seen.half_step[1:], positions=())
    behind = sipit.invert(lm, rest, known_prefix=ids[:1].tolist())
    assert behind.n_checked >= VOCAB


def test_first_states_of_a_large_vocabulary_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_states_module, "_MOST_BYTES", VOCAB * 32 * 4 - 1)
    lm = LanguageModel(tiny_model("llama"), name="llama")
    assert first_states_module.first_states(lm, Cut(LAYER), 6) is None
    for seed in (1, 2):
        assert sipit.invert(lm, _in_whole_steps(lm, random_ids(6, seed=seed), LAYER)).n_checked >= VOCAB
