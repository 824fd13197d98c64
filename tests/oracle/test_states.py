"""Every state this package computes, against the library's own full forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel
from sipit.observations import Cut, Site
from tests.tiny_models import N_LAYERS, VOCAB, WINDOW, random_ids, tiny_model, true_states

CUTS: tuple[tuple[int, Site], ...] = (
    (0, "block"),
    (1, "block"),
    (2, "block"),
    (N_LAYERS, "block"),
    (N_LAYERS, "final"),
)
IDS = random_ids(11, seed=1)
EXACT = 2e-5  # of the norm: far above float32 sums in another order, far below a key seen or missed


def _check(got: Tensor, expected: Tensor) -> None:
    gaps = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(gaps.max()) < EXACT


def _truth(lm: LanguageModel, prompts: list[list[int]], layer: int, site: Site) -> Tensor:
    """Return the last state of each prompt, each run by itself. (N, D)."""
    return torch.stack([true_states(lm.model, lm.name, torch.tensor(p))[(layer, site)][-1] for p in prompts])


@pytest.mark.parametrize(("layer", "site"), CUTS)
def test_capture_equals_output_hidden_states(family_lm: LanguageModel, layer: int, site: Site) -> None:
    seen = family_lm.capture(input_ids=IDS, layer=layer, site=site)
    expected = true_states(family_lm.model, family_lm.name, IDS)[(layer, site)]
    torch.testing.assert_close(seen.states, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("layer", "site"), CUTS)
def test_packed_candidates_equal_their_own_prompts(family_lm: LanguageModel, layer: int, site: Site) -> None:
    prefix, candidates = IDS[: WINDOW + 3].tolist(), list(range(0, VOCAB, 11))
    cut = family_lm.cut(Cut(layer, site))
    row = cut.row()
    # accepted tokens stand apart from wrong ones in the first pass, so that keep() must move them
    packed = [77, prefix[0], prefix[1], 78, prefix[2]]
    sees = torch.eye(5, dtype=torch.bool)
    sees[2, 1] = sees[4, 1] = sees[4, 2] = True
    row.run(torch.tensor(packed), torch.tensor([0, 0, 1, 0, 2]), sees)
    row.keep([1, 2, 4])
    row.extend(torch.tensor(prefix[3:]))
    assert row.length == len(prefix)

    got = row.run(torch.tensor(candidates), torch.full((len(candidates),), len(prefix)))
    _check(got, _truth(family_lm, [[*prefix, c] for c in candidates], layer, site))


@pytest.mark.parametrize(("layer", "site"), CUTS)
def test_packed_tree_equals_its_paths(family_lm: LanguageModel, layer: int, site: Site) -> None:
    prefix = IDS[: WINDOW + 2].tolist()
    cut = family_lm.cut(Cut(layer, site))
    row = cut.row()
    row.extend(torch.tensor(prefix))
    parents = [-1, -1, 0, 0, 1, 2, 5, 6, 7]  # place of each token's parent in the row
    tokens = [3, 9, 4, 5, 4, 6, 7, 8, 9]
    sees = torch.eye(len(tokens), dtype=torch.bool)
    paths: list[list[int]] = []
    for i, parent in enumerate(parents):
        if parent >= 0:
            sees[i] |= sees[parent]
        paths.append([*(paths[parent] if parent >= 0 else prefix), tokens[i]])
    places = torch.tensor([len(path) - 1 for path in paths])
    _check(row.run(torch.tensor(tokens), places, sees), _truth(family_lm, paths, layer, site))


@pytest.mark.parametrize(("layer", "site"), CUTS)
def test_truncated_cache_forgets_what_was_cut_off(family_lm: LanguageModel, layer: int, site: Site) -> None:
    cut = family_lm.cut(Cut(layer, site))
    row = cut.row()
    row.extend(IDS)
    row.truncate(WINDOW + 1)
    candidates = [1, 2, 3]
    got = row.run(torch.tensor(candidates), torch.full((3,), WINDOW + 1))
    prefix = IDS[: WINDOW + 1].tolist()
    _check(got, _truth(family_lm, [[*prefix, c] for c in candidates], layer, site))


@pytest.mark.parametrize(("layer", "site"), CUTS)
def test_prompts_in_one_row_do_not_see_each_other(family_lm: LanguageModel, layer: int, site: Site) -> None:
    prefixes = [IDS[: WINDOW + 2].tolist(), IDS[5:8].tolist(), random_ids(WINDOW + 4, seed=9).tolist()]
    cut = family_lm.cut(Cut(layer, site))
    row = cut.row()
    for step in range(max(map(len, prefixes))):  # tokens of the prompts alternate in the row
        lanes = [lane for lane, prefix in enumerate(prefixes) if step < len(prefix)]
        tokens = torch.tensor([prefixes[lane][step] for lane in lanes])
        row.run(tokens, torch.full((len(lanes),), step), lanes=torch.tensor(lanes))
        row.keep(range(len(lanes)))
    for alive in ([0, 1, 2], [1, 2], [1]):
        of = torch.tensor(alive).repeat_interleave(2)
        places = torch.tensor([len(prefixes[lane]) for lane in of.tolist()])
        tokens = torch.arange(len(of)) * 17
        got = row.run(tokens, places, lanes=of)
        paths = [[*prefixes[lane], token] for lane, token in zip(of.tolist(), tokens.tolist(), strict=True)]
        _check(got, _truth(family_lm, paths, layer, site))
        row.drop(0 if 0 in alive else 2)
    assert row.length == len(prefixes[1])  # what was dropped was given back


def test_long_prefix_outgrows_the_cache_buffer_and_stays_exact(llama: LanguageModel) -> None:
    ids = torch.cat([random_ids(120, seed=s) for s in range(5)])  # 600 tokens: more than the room at first
    cut = llama.cut(Cut(2))
    row = cut.row()
    for start in range(0, 600, 60):
        sees = torch.ones(60, 60, dtype=torch.bool).tril()
        got = row.run(ids[start : start + 60], torch.arange(start, start + 60), sees)
        row.keep(range(60))
    _check(got, true_states(llama.model, "llama", ids)[(2, "block")][-60:])


def test_packed_embeddings_equal_packed_tokens(family_lm: LanguageModel) -> None:
    cut = family_lm.cut(Cut(2))
    row = cut.row()
    row.run(IDS, torch.arange(len(IDS)), torch.ones(len(IDS), len(IDS), dtype=torch.bool).tril())
    row.keep(range(5))
    tokens, places = torch.tensor([5, 6]), torch.tensor([5, 5])
    by_token = row.run(tokens, places)
    with torch.no_grad():
        by_row = row.run_embeddings(family_lm.embeddings.rows(tokens), places)
    _check(by_row, by_token)


@pytest.mark.parametrize("layer", [1, 2, N_LAYERS - 1, N_LAYERS])
def test_blocks_above_reproduce_the_final_states(family_lm: LanguageModel, layer: int) -> None:
    truth = true_states(family_lm.model, family_lm.name, IDS)
    final, n_blocks = family_lm.final_states(truth[(layer, "block")], layer, "block")
    assert n_blocks == N_LAYERS - layer
    _check(final, truth[(N_LAYERS, "final")])


def test_final_states_of_site_final_are_the_observed_ones(llama: LanguageModel) -> None:
    states = true_states(llama.model, "llama", IDS)[(N_LAYERS, "final")]
    final, n_blocks = llama.final_states(states, N_LAYERS, "final")
    assert n_blocks == 0
    assert torch.equal(final, states)


def test_next_token_logits_equal_the_models_own(family_lm: LanguageModel) -> None:
    final = true_states(family_lm.model, family_lm.name, IDS)[(N_LAYERS, "final")]
    with torch.no_grad():
        expected: Any = family_lm.model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(family_lm.next_token_logits(final), expected, rtol=1e-4, atol=1e-4)


def test_float64_packed_states_equal_ordinary_ones_to_twelve_digits() -> None:
    lm = LanguageModel(tiny_model("gpt2").double(), name="gpt2")
    cut = lm.cut(Cut(3))
    row = cut.row()
    row.run(IDS, torch.arange(len(IDS)), torch.ones(len(IDS), len(IDS), dtype=torch.bool).tril())
    row.keep(range(8))
    got = row.run(torch.arange(20), torch.full((20,), 8))
    expected = _truth(lm, [[*IDS[:8].tolist(), c] for c in range(20)], 3, "block")
    assert float((got - expected).norm(dim=1).max() / expected.norm(dim=1).max()) < 1e-12
