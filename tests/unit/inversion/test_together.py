"""Prompts that share their packed passes come out as each would by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sipit
from sipit import LanguageModel, Observation
from sipit.errors import MismatchError, OptionError
from sipit.inversion import SearchOptions, invert_many
from sipit.inversion.search import batching as search_module
from sipit.inversion.search.batching import search_together
from sipit.models import PackedRow
from tests.tiny_models import random_ids, tiny_model

LAYER = 2
LENGTHS = (7, 1, 12, 3, 9)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(tiny_model("mistral"), name="mistral")  # its window is shorter than most prompts here


@pytest.fixture(scope="module")
def observations(lm: LanguageModel) -> list[Observation]:
    return [lm.capture(input_ids=random_ids(n, seed=n), layer=LAYER) for n in LENGTHS]


def _ids(n: int) -> tuple[int, ...]:
    return tuple(random_ids(n, seed=n).tolist())


@pytest.mark.thorough
@given(
    n_slots=st.integers(1, 6), max_batch=st.sampled_from([1, 3, 16, 256]), policy=st.sampled_from(["auto", "likely"])
)
@settings(max_examples=12, deadline=None)
def test_however_they_share_every_prompt_is_recovered_in_order(
    lm: LanguageModel, observations: list[Observation], n_slots: int, max_batch: int, policy: str
) -> None:
    found = list(search_together(lm, observations, SearchOptions(max_batch=max_batch, policy=policy), n_slots=n_slots))
    assert [f.input_ids for f in found] == [_ids(n) for n in LENGTHS]
    assert {f.verdict for f in found} == {"recovered"}
    assert [f.observation_sha256 for f in found] == [seen.digest() for seen in observations]


def test_sharing_neither_exceeds_the_batch_nor_runs_prompts_apart(
    lm: LanguageModel, observations: list[Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(search_together(lm, observations[:1], SearchOptions(), n_slots=1))  # whatever is measured once, is here
    rows: list[tuple[int, int]] = []
    real = PackedRow.run

    def watched(row: PackedRow, token_ids: torch.Tensor, *rest: Any, lanes: torch.Tensor | None = None) -> torch.Tensor:
        if lanes is not None and len(rest) == 2:  # else it measures noise
            rows.append((len(token_ids), len(lanes.unique())))
        return real(row, token_ids, *rest, lanes=lanes)

    monkeypatch.setattr(PackedRow, "run", watched)
    list(search_together(lm, observations, SearchOptions(max_batch=32), n_slots=4))
    assert max(n_tokens for n_tokens, _ in rows) <= 32
    assert max(n_prompts for _, n_prompts in rows) > 1
    n_passes = {}
    for n_slots in (4, 1):
        rows.clear()
        list(search_together(lm, observations, SearchOptions(max_batch=128), n_slots=n_slots))
        n_passes[n_slots] = len(rows)
    assert {n_prompts for _, n_prompts in rows} == {1}
    assert n_passes[4] < n_passes[1]


def test_one_prompt_of_another_model_is_unmatched_and_leaves_its_neighbours_alone(
    lm: LanguageModel, observations: list[Observation]
) -> None:
    foreign = replace(observations[2], states=observations[2].states.flip(1))
    found = list(search_together(lm, [observations[0], foreign, observations[4]], SearchOptions(), n_slots=3))
    assert [f.verdict for f in found] == ["recovered", "unmatched", "recovered"]
    assert [found[0].input_ids, found[2].input_ids] == [_ids(7), _ids(9)]


def test_cost_of_each_is_its_own(lm: LanguageModel, observations: list[Observation]) -> None:
    list(invert_many(lm, observations))  # the anchors, once
    for found in search_together(lm, observations, SearchOptions(policy="vocabulary"), n_slots=5):
        alone = sipit.invert(
            lm, next(o for o in observations if o.digest() == found.observation_sha256), policy="vocabulary"
        )
        assert (found.block_tokens, found.n_checked) == (alone.block_tokens, alone.n_checked)
        assert found.seconds > 0


def test_refused_observation_is_named_after_those_before_it(lm: LanguageModel, observations: list[Observation]) -> None:
    foreign = replace(observations[1], fingerprint="sha256:0")
    results = search_together(lm, [observations[0], foreign, observations[2]], SearchOptions(), n_slots=3)
    assert next(results).input_ids == _ids(7)
    with pytest.raises(MismatchError):
        next(results)


def test_layers_and_long_prompts_do_not_share(
    lm: LanguageModel, observations: list[Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = lm.capture(input_ids=random_ids(6, seed=6), layer=3)
    mixed = [observations[0], other, observations[1]]
    assert [f.layer for f in search_together(lm, mixed, SearchOptions(), n_slots=3)] == [LAYER, 3, LAYER]
    monkeypatch.setattr(search_module, "_SHARED_TOKENS", 10)
    assert [f.seq_len for f in search_together(lm, observations, SearchOptions(), n_slots=5)] == list(LENGTHS)


def test_nothing_starts_before_it_is_among_the_next_to_be_yielded(
    lm: LanguageModel, observations: list[Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = search_module.BatchScheduler.begin

    def watched(scheduler: search_module.BatchScheduler, number: int, seen: Observation) -> None:
        begun.append(number)
        begin(scheduler, number, seen)

    monkeypatch.setattr(search_module.BatchScheduler, "begin", watched)
    for n_yielded, _ in enumerate(search_together(lm, observations, SearchOptions(), n_slots=2)):
        assert max(begun) - n_yielded < 2


def test_options_are_refused_before_any_work(lm: LanguageModel, observations: list[Observation]) -> None:
    with pytest.raises(OptionError, match="max_batch"):
        list(search_together(lm, observations, SearchOptions(max_batch=0), n_slots=2))
