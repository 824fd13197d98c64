"""A row that leaves its token open is settled by the row behind it, or named as ambiguous where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sipit
from sipit import LanguageModel, Observation
from sipit.inversion.search import prompt_search
from sipit.inversion.search.trials import Trials
from tests.tiny_models import FAMILIES, random_ids, tiny_model, twin_model

IDS = random_ids(7, seed=11)
_ALL = 1e3  # a box that holds every state


def _opened(lm: LanguageModel, rows: tuple[int, ...], layer: int = 2) -> Observation:
    """States whose rows at some positions were rounded so coarsely that every token fits there."""
    seen = lm.capture(input_ids=IDS, layer=layer)
    half_step = torch.zeros_like(seen.states)
    half_step[list(rows)] = _ALL
    # what is stored is the middle of the box, which is anywhere but where the state is
    states = seen.states + half_step * 0.3 * torch.randn(seen.states.shape, generator=torch.Generator().manual_seed(1))
    return replace(seen, states=states, half_step=half_step)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", [0, 3])
def test_row_behind_settles_a_row_that_every_token_fits(family: str, row: int) -> None:
    lm = LanguageModel(tiny_model(family))
    found = sipit.invert(lm, _opened(lm, (row,)))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert found.positions[row].rivals == ()


def test_last_row_that_every_token_fits_is_ambiguous() -> None:
    lm = LanguageModel(tiny_model("llama"))
    found = sipit.invert(lm, _opened(lm, (6,)))
    assert found.verdict == "ambiguous"
    assert found.input_ids[:6] == tuple(IDS[:6].tolist())


def test_row_behind_settles_nothing_where_states_are_embeddings() -> None:
    lm = LanguageModel(tiny_model("llama"))
    assert sipit.invert(lm, _opened(lm, (0,), layer=0)).verdict == "ambiguous"


def test_twins_stay_ambiguous_behind_each_other() -> None:
    lm = LanguageModel(twin_model("llama", int(IDS[2]), 149))
    found = sipit.invert(lm, lm.capture(input_ids=IDS, layer=2))
    assert found.verdict == "ambiguous"
    assert {found.input_ids[2], found.positions[2].rivals[0].token_id} == {int(IDS[2]), 149}


@pytest.mark.thorough
def test_several_prompts_with_open_rows_share_their_passes() -> None:
    lm = LanguageModel(tiny_model("llama"))
    found = list(sipit.inversion.invert_many(lm, [_opened(lm, (0,)) for _ in range(3)]))
    assert all(one.input_ids == tuple(IDS.tolist()) and one.verdict == "recovered" for one in found)


def test_what_the_inverse_expects_behind_a_fork_is_tried_however_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, nearest = LanguageModel(tiny_model("llama")), Trials.nearest

    def without_the_truth(self: Trials, n: int) -> list[int]:
        return [i for i in nearest(self, n + 1) if i != int(IDS[1])][:n]  # as behind a token that makes it a sink

    monkeypatch.setattr(Trials, "nearest", without_the_truth)
    monkeypatch.setattr(prompt_search, "_DOUBTED_AFTER", 8)
    found = sipit.invert(lm, _opened(lm, (0,)))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
