"""A miss says what the rows and the checked tokens tell of its cause."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sipit
from sipit import LanguageModel
from sipit.observations import Site
from tests.tiny_models import random_ids

IDS = random_ids(7, seed=8)


def _moved(states: Tensor) -> Tensor:
    moved = states.clone()
    moved[3] += 0.001 * states[3].norm() / 32**0.5
    return moved


@pytest.mark.parametrize(
    ("change", "position", "word"),
    [
        (_moved, 3, "stands out"),
        (lambda states: torch.cat([states, torch.zeros(1, 32)]), 7, "all zeros"),
        (lambda states: torch.cat([states, states[2:3]]), 7, "equals row 2"),
        (lambda states: torch.nn.functional.normalize(states, dim=1), 0, "length 1"),
        (lambda states: states[2:], 0, "first rows of the prompt are missing"),
        (lambda states: torch.cat([states[:4], states.flip(0)[:2]]), 4, "another prompt"),
    ],
)
def test_miss_names_its_likeliest_cause(llama: LanguageModel, change: object, position: int, word: str) -> None:
    states = llama.capture(input_ids=IDS, layer=2).states
    found = sipit.invert(llama, change(states), layer=2)  # type: ignore[operator]
    assert found.miss is not None
    assert found.miss.position == position
    assert word in found.miss.diagnosis
    assert word in found.summary()
    assert found.miss.runner_up is not None
    assert found.miss.runner_up >= found.miss.distance


class _Reading:
    """Reads all rows right but the first, as an inverse of a larger model does."""

    def scores(self, _: Tensor) -> Tensor:
        read = torch.nn.functional.one_hot(IDS, 160).float()
        read[0] = 0.0
        return read


@pytest.mark.parametrize("is_read", [True, False])
def test_rows_that_were_moved_are_named_though_the_first_tells_no_token_from_another(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    """As after a pass in TF32: the first row is moved by as much as tokens' first rows differ, the others by less."""
    if is_read:
        monkeypatch.setattr("sipit.inversion.search.diagnosis.ridge_inverse", lambda *_: _Reading())
        monkeypatch.setattr("sipit.inversion.search.diagnosis.queries_of", lambda _, rows: rows)
    states = llama.capture(input_ids=IDS, layer=2).states
    another = llama.capture(input_ids=[(int(IDS[0]) + 1) % llama.vocab_size], layer=2).states
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)) / 32**0.5
    rows = states + 1e-3 * states.norm(dim=1, keepdim=True) * noise
    rows[0] = 0.8 * states[0] + 0.2 * another[0]
    found = sipit.invert(llama, rows, layer=2)
    assert found.miss is not None
    assert found.miss.position == 0
    assert ("row 1 stands out" in found.miss.diagnosis) is is_read
    if is_read:
        assert float(found.miss.diagnosis.rpartition(" ")[2]) > found.miss.distance


def test_right_layer_by_mistake_for_the_next_misses_after_the_whole_vocabulary(llama: LanguageModel) -> None:
    states = llama.capture(input_ids=IDS, layer=3).states
    found = sipit.invert(llama, states, layer=2)
    assert found.miss is not None
    assert found.miss.n_checked == llama.vocab_size


@pytest.mark.parametrize(
    ("taken", "site", "said", "word"),
    [(3, "block", 2, "layer 3, site block"), (1, "block", 2, "layer 1, site block"), (4, "final", 4, "site final")],
)
def test_states_of_another_layer_or_site_are_named(
    llama: LanguageModel, taken: int, site: Site, said: int, word: str
) -> None:
    states = llama.capture(input_ids=IDS, layer=taken, site=site).states
    found = sipit.invert(llama, states, layer=said)
    assert found.miss is not None
    assert word in found.miss.diagnosis
    assert f"token {int(IDS[0])}" in found.miss.diagnosis
