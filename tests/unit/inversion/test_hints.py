"""Hints, kept prefixes, trees of guesses: they may be wrong, the result may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sipit import LanguageModel, invert
from sipit.errors import InputError, OptionError
from sipit.inversion import PrefixFile, Progress
from sipit.inversion.proposals.price import n_worth_checking
from sipit.inversion.proposals.proposal import Draft
from sipit.inversion.search.tree import build_tree
from tests.tiny_models import VOCAB, random_ids, tiny_model

_IDS = random_ids(14, seed=21)


def test_right_hint_costs_one_forward_pass(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=_IDS, layer=3)
    found = invert(llama, seen, hint=_IDS.tolist(), policy="vocabulary")
    assert (found.verdict, found.input_ids) == ("recovered", tuple(_IDS.tolist()))
    assert found.block_tokens == len(_IDS) * 3


@pytest.mark.parametrize("wrong_at", [0, 5, 13])
@pytest.mark.parametrize("policy", ["auto", "vocabulary", "gradient"])
def test_wrong_hint_is_put_right(llama: LanguageModel, policy: str, wrong_at: int) -> None:
    hint = _IDS.clone()
    hint[wrong_at] = (hint[wrong_at] + 1) % VOCAB
    seen = llama.capture(input_ids=_IDS, layer=2)
    found = invert(llama, seen, hint=hint.tolist(), policy=policy)  # type: ignore[arg-type]
    assert (found.verdict, found.input_ids) == ("recovered", tuple(_IDS.tolist()))


def test_hint_longer_than_the_prompt_is_cut(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=_IDS, layer=2)
    assert invert(llama, seen, hint=[*_IDS.tolist(), 3, 4]).input_ids == tuple(_IDS.tolist())


def test_hint_outside_the_vocabulary_is_refused(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=_IDS, layer=2)
    with pytest.raises(OptionError, match="hint"):
        invert(llama, seen, hint=[VOCAB])


def _progress(ids: tuple[int, ...]) -> Progress:
    return Progress(seq_len=14, input_ids=ids, n_passes=1, n_checked=0, block_tokens=0, seconds=0.0)


def test_kept_prefix_comes_back(llama: LanguageModel, tmp_path: Path) -> None:
    seen = llama.capture(input_ids=_IDS, layer=2)
    path = tmp_path / "prefix.json"
    PrefixFile(path, seen).save((1, 2, 3))
    assert PrefixFile(path, seen).input_ids == (1, 2, 3)


def test_prefix_is_not_written_at_every_step(llama: LanguageModel, tmp_path: Path) -> None:
    kept = PrefixFile(tmp_path / "prefix.json", llama.capture(input_ids=_IDS, layer=2))
    kept.update(_progress((1,)))
    assert not (tmp_path / "prefix.json").exists()


def test_prefix_of_another_observation_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "prefix.json"
    PrefixFile(path, llama.capture(input_ids=_IDS, layer=2)).save((1,))
    with pytest.raises(InputError, match="another observation"):
        PrefixFile(path, llama.capture(input_ids=_IDS, layer=1))


@pytest.mark.parametrize("content", ["no json", "{}", '{"format": "sipit.prefix"}', "[]"])
def test_file_that_is_no_prefix_is_refused(llama: LanguageModel, tmp_path: Path, content: str) -> None:
    path = tmp_path / "prefix.json"
    path.write_text(content)
    with pytest.raises(InputError, match="does not hold a recovered prefix"):
        PrefixFile(path, llama.capture(input_ids=_IDS, layer=2))
    assert path.read_text() == content


def test_removed_prefix_leaves_nothing(llama: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "prefix.json"
    kept = PrefixFile(path, llama.capture(input_ids=_IDS, layer=2))
    kept.save((4,))
    assert json.loads(path.read_text())["input_ids"] == [4]
    kept.remove()
    assert not path.exists()


@given(chances=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_at_least_one_guess_is_always_worthwhile(chances: list[float]) -> None:
    assert 1 <= n_worth_checking(sorted(chances, reverse=True), 1.0) <= len(chances)


@given(
    n_batch=st.integers(1, 6),
    rows=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=3), max_size=6),
    first=st.floats(0, 1),
    limit=st.integers(6, 20),
    price=st.floats(0.5, 64.0),
)
def test_tree_shows_each_guess_what_it_continues_and_nothing_else(
    n_batch: int, rows: list[list[float]], first: float, limit: int, price: float
) -> None:
    ahead = [(list(range(len(row))), sorted(row, reverse=True)) for row in rows]
    draft = Draft(here=[first, 1 - first], ahead=iter(ahead))
    tree = build_tree(
        torch.arange(n_batch),
        5,
        draft,
        max_tokens=limit,
        price=price,
        beside=lambda asked: [[i + 1, 99] for i, _ in asked],
    )
    assert len(tree.token_ids) == len(tree.parents) <= max(limit, n_batch)
    assert tree.behind()[:n_batch] == list(range(n_batch))
    assert (tree.attends is None) == (max(tree.parents) < 0)
    paths: list[tuple[int, ...]] = []
    for column, parent in enumerate(tree.parents):
        paths.append((column,) if parent < 0 else (*paths[parent], column))
        assert int(tree.positions[column]) == 5 + len(paths[-1]) - 1
        if tree.attends is not None:
            assert set(tree.attends[column].nonzero()[:, 0].tolist()) == set(paths[-1])
    seen_as = [tuple(tree.token_ids[list(path)].tolist()) for path in paths]
    assert len(set(seen_as)) == len(seen_as)  # no sequence twice


def test_a_doubtful_position_is_gone_on_behind_from_both_tokens() -> None:
    doubtful, sure = [0.5, 0.45], [0.98, 0.01]
    ahead = iter([([1, 2], doubtful), ([3, 4], sure), ([5, 6], sure)])
    tree = build_tree(torch.tensor([0]), 0, Draft(here=[1.0], ahead=ahead), max_tokens=64, price=32.0)
    paths = [(0,) if parent < 0 else () for parent in tree.parents]
    for column, parent in enumerate(tree.parents[1:], start=1):
        paths[column] = (*paths[parent], int(tree.token_ids[column]))
    assert {(0, 1, 3, 5), (0, 2, 3, 5)} <= set(paths)


def _doubtful_text(length: int) -> Draft:
    """Guesses that are right at three positions of five, with two more that may be."""
    chances = [0.6, 0.25, 0.1]
    ahead = (([3 * i, 3 * i + 1, 3 * i + 2], chances) for i in range(1, length))
    return Draft(here=[0.9], ahead=ahead)


def test_a_pass_looks_far_ahead_behind_doubtful_guesses_where_passes_are_dear() -> None:
    dear = build_tree(torch.tensor([0]), 0, _doubtful_text(12), max_tokens=256, price=48.0)
    trunk = [0]
    while behind := dear.behind(trunk[-1]):
        trunk.append(min(behind, key=lambda column: int(dear.token_ids[column])))
    assert int(dear.positions.max()) == 11  # the chance that all of these are right is 1 in 280
    assert dear.token_ids[trunk].tolist() == [0, *range(3, 36, 3)]
    for column in trunk[:-1]:
        assert {int(dear.token_ids[i]) % 3 for i in dear.behind(column)} == {0, 1, 2}
    cheap = build_tree(torch.tensor([0]), 0, _doubtful_text(12), max_tokens=256, price=1.5)
    assert cheap.token_ids.tolist() == [0, 3]  # the nearest guess would be run next in any case


def test_a_pass_looks_no_further_ahead_than_it_may_hold() -> None:
    tree = build_tree(torch.tensor([0]), 0, _doubtful_text(200), max_tokens=20, price=48.0)
    assert len(tree.token_ids) <= 20
    sure = (([i], [0.7]) for i in range(200))
    alone = build_tree(torch.tensor([0]), 0, Draft(here=[0.9], ahead=sure), max_tokens=256, price=48.0)
    assert int(alone.positions.max()) < 12  # nothing stands beside these guesses, so there is nothing to be told


@pytest.mark.parametrize(("price", "expected"), [(0.5, 1), (2.0, 2), (8.0, 3), (100.0, 4)])
def test_tokens_are_checked_along_as_far_as_the_price_of_a_pass_pays(price: float, expected: int) -> None:
    assert n_worth_checking([0.5, 0.3, 0.1, 0.05], price) == expected


def test_what_may_fit_beside_a_guess_is_checked_in_the_pass_that_checks_the_guess() -> None:
    model = tiny_model("llama", seed=4)
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        rows[1::2] = rows[::2] * (1 + 5e-5)  # every token has a twin
    lm = LanguageModel(model)
    ids = random_ids(12, seed=1)
    found = invert(lm, lm.capture(input_ids=ids, layer=2), hint=ids.tolist(), use_fit=False)
    assert [one.token_id // 2 for one in found.positions] == [i // 2 for i in ids.tolist()]
    assert all(one.n_checked >= 2 for one in found.positions)
    assert found.n_passes <= 4
