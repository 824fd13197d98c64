"""Writing on with a cache gives the states of ordinary passes."""

from __future__ import annotations

import pytest
import torch

from sipit import LanguageModel
from sipit.observations import Cut
from tests.tiny_models import FAMILIES, N_LAYERS, random_ids, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_rows_written_on_are_those_of_ordinary_passes(family: str) -> None:
    lm = LanguageModel(tiny_model(family), name=family)
    rows = torch.stack([random_ids(14, seed=seed) for seed in range(3)])
    cuts = [Cut(1), Cut(N_LAYERS, "final")]
    tapped, cache = lm.tapped(cuts), lm.generation_cache(14)
    parts = [tapped.states(part, cache) for part in (rows[:, :3], *rows[:, 3:].split(1, dim=1))]
    for i, cut in enumerate(cuts):
        found = torch.cat([part[i] for part in parts], dim=1)
        expected = torch.stack([lm.cut(cut).ordinary(ids) for ids in rows])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
