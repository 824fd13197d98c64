"""Later states near an earlier one: the token that gave that one is tried first."""

from __future__ import annotations

import pytest
import torch

import sipit
from sipit import LanguageModel
from sipit.inversion.proposals.repeated import RepeatedStates, first_near
from tests.tiny_models import random_ids, tiny_model


def _brute(states: torch.Tensor, reach: float) -> dict[int, int]:
    found = {}
    for position in range(1, len(states)):
        gaps = (states[:position] - states[position]).double().norm(dim=1)
        near = (gaps < reach * states[position].double().norm()).nonzero()[:, 0]
        if len(near):
            found[position] = int(near[0])
    return found


@pytest.mark.parametrize("rows", [3, 7, 512])
@pytest.mark.parametrize("scale", [1.0, 1e25])
def test_sources_are_those_of_all_comparisons(monkeypatch: pytest.MonkeyPatch, rows: int, scale: float) -> None:
    monkeypatch.setattr("sipit.inversion.proposals.repeated._ROWS", rows)
    generator = torch.Generator().manual_seed(rows)
    kinds = torch.randn(6, 16, generator=generator)
    states = kinds[torch.randint(6, (23,), generator=generator)] + 0.05 * torch.randn(23, 16, generator=generator)
    expected = _brute(states, 0.1)
    assert 0 < len(expected) < 22
    assert first_near(states * scale, 0.1) == expected


def test_token_is_known_once_its_source_is_recovered() -> None:
    echoes = RepeatedStates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.01]]), 0.1)
    assert [echoes.token(2, prefix) for prefix in ([], [5], [5, 6])] == [None, None, 6]
    assert echoes.token(1, [5]) is None


@pytest.mark.parametrize("layer", [2, 4])
def test_repeats_of_one_token_cost_one_candidate_each(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sipit.inversion.search.batching.pass_price", lambda *_: 4.0)
    lm = LanguageModel(tiny_model("llama"))
    ids = random_ids(1, seed=3).repeat(12)
    found = sipit.invert(lm, lm.capture(input_ids=ids, layer=layer), use_fit=False)
    assert found.verdict == "recovered"
    assert found.input_ids == tuple(ids.tolist())
    assert [position.n_checked for position in found.positions[2:]] == [1] * 10  # 1 was guessed beside 0


def test_an_echo_of_another_token_costs_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sipit.inversion.search.batching.pass_price", lambda *_: 4.0)  # little is guessed ahead
    lm = LanguageModel(tiny_model("llama"))
    ids = random_ids(9, seed=4)
    seen = lm.capture(input_ids=ids, layer=2)
    plain = sipit.invert(lm, seen, use_fit=False)
    to_the_one_before = {position: position - 1 for position in range(1, 9)}
    monkeypatch.setattr("sipit.inversion.proposals.repeated.first_near", lambda *_: to_the_one_before)
    misled = sipit.invert(lm, seen, use_fit=False)
    assert [position.n_checked for position in misled.positions] != [position.n_checked for position in plain.positions]
    assert misled.input_ids == plain.input_ids == tuple(ids.tolist())
    assert misled.verdict == "recovered"
    assert misled.n_checked < plain.n_checked + 200
