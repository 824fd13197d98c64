"""States that a fit keeps on disk: what was computed is what is read, and an interruption loses one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel
from sipit.inversion.fitting.states import CapturedStates, StatesFolder, capture_windows, sample_windows
from sipit.observations import Cut
from tests.tiny_models import N_LAYERS, VOCAB, random_ids, tiny_model

_CUTS: list[Cut] = [Cut(1, "block"), Cut(N_LAYERS, "final")]
_LENGTH = 9


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(tiny_model("llama", seed=4), name="states")


def _folder(lm: LanguageModel, path: Path, n_windows: int) -> StatesFolder:
    return StatesFolder(path, {cut: lm.width(cut) for cut in _CUTS}, n_windows, _LENGTH)


def _expected(lm: LanguageModel, cut: Cut, windows: Tensor) -> Tensor:
    states = torch.stack([lm.cut(cut).ordinary(ids) for ids in windows])
    return states / states.square().mean(dim=-1, keepdim=True).sqrt()


def test_states_on_disk_are_those_of_ordinary_passes(lm: LanguageModel, tmp_path: Path) -> None:
    starts = [torch.tensor([[3], [7]]), torch.tensor([[1, 2, 3]])]
    given = torch.stack([random_ids(_LENGTH, seed=seed) for seed in range(11)])
    folder = _folder(lm, tmp_path, 14)
    spent = sample_windows(lm, starts, _CUTS, folder, seed=0, on_step=lambda *_: None)
    spent += capture_windows(lm, given, _CUTS, folder, lambda *_: None)
    assert spent == 14 * _LENGTH * N_LAYERS
    windows = folder.windows
    assert torch.equal(windows[3:], given)
    assert torch.equal(windows[:2, :1], starts[0])
    assert torch.equal(windows[2:3, :3], starts[1])
    assert int(windows.max()) < VOCAB
    rows = torch.tensor([5 * _LENGTH + 1, 1, 13 * _LENGTH + 7])
    for cut in _CUTS:
        flat = _expected(lm, cut, windows).flatten(0, 1)
        with CapturedStates(folder.paths[cut]) as states:
            for found, step in zip(states.around(rows), (-1, 0, 1), strict=True):
                # in bfloat16; another row is 1 away
                torch.testing.assert_close(found, flat[rows + step], rtol=0, atol=0.1)


def test_last_row_has_nothing_after_it(lm: LanguageModel, tmp_path: Path) -> None:
    folder = _folder(lm, tmp_path, 2)
    capture_windows(lm, random_ids(2 * _LENGTH, seed=1).view(2, -1), _CUTS, folder, lambda *_: None)
    with CapturedStates(folder.paths[_CUTS[0]]) as states:
        before, here, after = states.around(torch.tensor([2 * _LENGTH - 1]))
    assert before.any()
    assert here.any()
    assert not after.any()


def test_sampling_goes_on_behind_the_batches_it_kept(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sipit.inversion.fitting.states._SAVE_EVERY", 1)
    starts = [torch.tensor([[i]]) for i in range(4)]
    (tmp_path / "whole").mkdir()
    whole = _folder(lm, tmp_path / "whole", 4)
    sample_windows(lm, starts, _CUTS, whole, seed=5, on_step=lambda *_: None)
    (tmp_path / "parts").mkdir()
    sample_windows(lm, starts[:2], _CUTS, _folder(lm, tmp_path / "parts", 4), seed=5, on_step=lambda *_: None)
    told: list[int] = []
    parts = _folder(lm, tmp_path / "parts", 4)
    assert parts.done == 2
    sample_windows(lm, starts, _CUTS, parts, seed=5, on_step=lambda done, _: told.append(done))
    assert min(told) == 2 * _LENGTH + 1
    assert torch.equal(parts.windows, whole.windows)
    for cut in _CUTS:
        assert parts.paths[cut].read_bytes() == whole.paths[cut].read_bytes()
