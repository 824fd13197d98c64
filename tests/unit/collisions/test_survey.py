"""Survey, continuations and margins of tiny models against all pairs of states from ordinary passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel
from sipit.collisions import (
    capture_continuations,
    capture_states,
    closest_prompts,
    last_states,
    survey_continuations,
    survey_layers,
    survey_margins,
)
from sipit.collisions.continuations import continued_states
from sipit.collisions.margins import Pick, closest_tokens
from sipit.errors import MismatchError, OptionError
from sipit.observations import Cut
from tests.tiny_models import (
    FAMILIES,
    N_LAYERS,
    VOCAB,
    embedding_rows,
    random_ids,
    text_model,
    tiny_model,
    true_states,
    twin_model,
)
from tests.unit.collisions.test_nearest import brute

CUTS: list[Cut] = [Cut(2, "block"), Cut(N_LAYERS, "block"), Cut(N_LAYERS, "final")]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(tiny_model("gpt2"), name="gpt2")


def _prompts() -> list[Tensor]:
    return [random_ids(2 + i % 3, seed=i) for i in range(60)]


def test_survey_reports_the_closest_pairs_and_their_scales(lm: LanguageModel, tmp_path: Path) -> None:
    given = _prompts()
    folder = capture_states(lm, given, CUTS, tmp_path / "s", shard_prompts=17)
    for cut, rows, layer in zip(
        CUTS, last_states(lm, given, CUTS), survey_layers(folder, k=4, is_full=True), strict=True
    ):
        expected = brute(rows, 10**6)
        norms = rows.double().norm(dim=1)
        assert (layer.layer, layer.site, layer.n_prompts, layer.n_pairs) == (*cut, 60, 1770)
        assert [(p.first, p.second) for p in layer.closest] == [(i, j) for _, i, j in expected[:4]]
        near, (distance, i, j) = layer.closest[0], expected[0]
        median = expected[len(expected) // 2][0]
        assert near.distance == pytest.approx(distance, rel=1e-9)
        assert near.relative_to_norm == pytest.approx(distance / float(norms[i] + norms[j]) * 2, rel=1e-9)
        assert near.relative_to_median == pytest.approx(distance / median, rel=1e-2)
        assert layer.farthest == pytest.approx(expected[-1][0], rel=1e-9)
        assert (layer.n_equal, layer.n_collisions) == (0, 0)
        assert [b.length for b in layer.by_length] == [2, 3, 4]
        of_three = [n for n, ids in enumerate(given) if len(ids) == 3]
        assert layer.by_length[1].least == pytest.approx(brute(rows[of_three], 1)[0][0], rel=1e-9)


def test_collisions_are_counted_and_equal_states_apart(tmp_path: Path) -> None:
    lm = LanguageModel(twin_model("llama", 40, 97), name="twins")
    given = [torch.tensor([5, 40]), torch.tensor([5, 97]), *_prompts()]
    folder = capture_states(lm, given, [Cut(2, "block")], tmp_path / "s")
    [layer] = survey_layers(folder, k=1)
    assert (layer.closest[0].first, layer.closest[0].second) == (0, 1)
    assert layer.n_collisions == 1
    assert layer.n_equal == int(torch.equal(*folder.blocks(Cut(2, "block"))[0][:2]))
    [wide] = survey_layers(folder, k=1, threshold=brute(folder.blocks(Cut(2, "block"))[0], 9)[-1][0])
    assert wide.n_collisions == 9


def test_closest_prompts_come_from_the_closest_pairs(lm: LanguageModel, tmp_path: Path) -> None:
    given = _prompts()
    folder = capture_states(lm, given, CUTS, tmp_path / "s")
    rows = last_states(lm, given, CUTS[:1])[0]
    numbers = list(dict.fromkeys(n for _, i, j in brute(rows, 60) for n in (i, j)))[:5]
    found = closest_prompts(folder, CUTS[0], n=5)
    assert [ids.tolist() for ids in found] == [given[n].tolist() for n in numbers]
    assert len(closest_prompts(folder, CUTS[0], n=1000)) == 60


@pytest.mark.parametrize("family", FAMILIES)
def test_continued_states_are_those_of_ordinary_passes(family: str) -> None:
    model = tiny_model(family)
    lm = LanguageModel(model, name=family)
    prefix, tokens = random_ids(6, seed=3), torch.tensor([4, 9, 149, 0, 77])
    cuts: list[Cut] = [Cut(1, "block"), *CUTS]
    found = continued_states(lm, prefix, tokens, cuts, batch=2)
    expected = true_states(model, family, torch.stack([torch.cat([prefix, t[None]]) for t in tokens]))
    for rows, cut in zip(found, cuts, strict=True):
        torch.testing.assert_close(rows, expected[cut][:, -1], rtol=1e-3, atol=1e-3)


def test_continuations_decide_every_pair_within_and_across(lm: LanguageModel, tmp_path: Path) -> None:
    prefixes = [random_ids(3, seed=1), random_ids(4, seed=2), random_ids(3, seed=5)]
    folder = capture_continuations(lm, prefixes, CUTS, tmp_path / "c")
    prompts = [torch.cat([p, torch.tensor([t])]) for p in prefixes for t in range(VOCAB)]
    expected_rows = last_states(lm, prompts, CUTS)
    for cut, rows, layer in zip(CUTS, expected_rows, survey_continuations(lm, folder), strict=True):
        pairs = brute(rows, 10**7)
        inner = [(d, i, j) for d, i, j in pairs if i // VOCAB == j // VOCAB]
        outer = [(d, i, j) for d, i, j in pairs if i // VOCAB != j // VOCAB]
        assert (layer.layer, layer.site, layer.n_prefixes, layer.n_tokens) == (*cut, 3, VOCAB)
        for summary, (distance, i, j), n in (
            (layer.within, inner[0], len(inner)),
            (layer.across, outer[0], len(outer)),
        ):
            assert (summary.n_pairs, summary.n_equal, summary.n_collisions) == (n, 0, 0)
            near = summary.closest
            assert near is not None
            assert (near.first, near.second) == (tuple(prompts[i].tolist()), tuple(prompts[j].tolist()))
            assert near.distance == pytest.approx(distance, rel=1e-3)
            assert near.ordinary_distance == pytest.approx(distance, rel=1e-6)
        least = [min(d for d, i, _ in inner if i // VOCAB == n) for n in range(3)]
        assert list(layer.least_by_prefix) == pytest.approx(least, rel=1e-3)


def test_tokens_with_equal_rows_are_counted_apart_and_one_takes_part(tmp_path: Path) -> None:
    twins = LanguageModel(twin_model("gpt2", 40, 97), name="twins")
    folder = capture_continuations(
        twins, [random_ids(3, seed=1), random_ids(2, seed=4)], [Cut(2, "block")], tmp_path / "c"
    )
    [layer] = survey_continuations(twins, folder)
    assert (layer.n_equal_rows, layer.n_tokens) == (1, VOCAB)
    assert layer.within.n_pairs == 2 * (VOCAB - 1) * (VOCAB - 2) // 2
    assert layer.across.n_pairs == (VOCAB - 1) ** 2
    for near in (layer.within.closest, layer.across.closest):
        assert near is not None
        assert 97 not in (near.first[-1], near.second[-1])
        assert near.distance == pytest.approx(near.ordinary_distance, rel=1e-3)


def test_continuations_go_on_where_they_stopped(lm: LanguageModel, tmp_path: Path) -> None:
    prefixes = [random_ids(3, seed=1), random_ids(4, seed=2)]
    tokens = torch.arange(20)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_continuations(lm, prefixes, CUTS, tmp_path / "c", token_ids=tokens, on_step=stop)
    first = (tmp_path / "c" / "states-00000.safetensors").stat().st_mtime_ns
    folder = capture_continuations(lm, prefixes, CUTS, tmp_path / "c", token_ids=tokens)
    assert len(folder) == 40
    assert (tmp_path / "c" / "states-00000.safetensors").stat().st_mtime_ns == first


def test_equal_prefixes_and_layer_zero_are_refused(lm: LanguageModel, tmp_path: Path) -> None:
    one = random_ids(3, seed=1)
    with pytest.raises(OptionError, match="different prompts"):
        capture_continuations(lm, [one, one.clone()], CUTS, tmp_path / "c")
    with pytest.raises(OptionError, match="layers of 1 or more"):
        capture_continuations(lm, [one], [Cut(0, "block")], tmp_path / "c")


def test_margins_over_the_whole_vocabulary_equal_brute_force(lm: LanguageModel) -> None:
    prefixes = [random_ids(3, seed=1), random_ids(5, seed=2)]
    found = survey_margins(lm, prefixes, CUTS, n_tokens=None)
    for cut, layer in zip(CUTS, found, strict=True):
        least = []
        for prefix in prefixes:
            prompts = [torch.cat([prefix, torch.tensor([t])]) for t in range(VOCAB)]
            least.append(brute(last_states(lm, prompts, [cut])[0], 1)[0])
        assert (layer.n_prefixes, layer.n_tokens, layer.is_whole_vocabulary) == (2, VOCAB, True)
        assert layer.least == pytest.approx(min(least)[0], rel=1e-3)
        assert layer.mean == pytest.approx(sum(d for d, _, _ in least) / 2, rel=1e-3)
        assert layer.least_tokens == min(least)[1:]
        assert layer.least_prefix == tuple(prefixes[least.index(min(least))].tolist())


@pytest.mark.parametrize("pick", ["near", "random"])
def test_margins_over_some_tokens_say_so_and_are_no_smaller(pick: Pick) -> None:
    lm = text_model()
    prefixes = [random_ids(3, seed=n) for n in range(4)]
    [whole] = survey_margins(lm, prefixes, [Cut(2, "block")], n_tokens=None)
    [some] = survey_margins(lm, prefixes, [Cut(2, "block")], n_tokens=40, pick=pick, seed=3, n_exhaustive=3)
    assert not some.is_whole_vocabulary
    assert (some.n_tokens, some.pick) == (40, pick)
    assert some.least >= whole.least * (1 - 1e-3)
    with pytest.raises(OptionError, match="at least 2"):
        survey_margins(lm, prefixes, [Cut(2, "block")], n_tokens=1)
    assert len(some.exact) == 3
    for prefix, margin in zip(prefixes, some.exact, strict=False):
        prompts = [torch.cat([prefix, torch.tensor([t])]) for t in range(lm.vocab_size)]
        distance, one, two = brute(last_states(lm, prompts, [Cut(2, "block")])[0], 1)[0]
        assert margin.prefix == tuple(prefix.tolist())
        assert margin.distance == pytest.approx(distance, rel=1e-3)
        assert margin.tokens == (one, two)
        assert margin.bound >= margin.distance * (1 - 1e-3)


def test_near_rows_give_the_margin_where_random_ones_miss_it() -> None:
    """Two tokens with nearly one row have nearly one state; equal rows are one token and give no margin of zero."""
    model = tiny_model("llama")
    rows = embedding_rows(model)
    rows[90], rows[120] = rows[17], 1.02 * rows[50]
    lm = LanguageModel(model)
    prefixes = [random_ids(3, seed=n) for n in range(3)]
    cuts: list[Cut] = [Cut(1, "block"), Cut(4, "final")]
    whole = survey_margins(lm, prefixes, cuts, n_tokens=None)
    near = survey_margins(lm, prefixes, cuts, n_tokens=6, n_exhaustive=3)
    random = survey_margins(lm, prefixes, cuts, n_tokens=6, pick="random")
    for all_of_them, some, any_ in zip(whole, near, random, strict=True):
        assert all_of_them.least_tokens == some.least_tokens == (50, 120)
        assert some.least == pytest.approx(all_of_them.least, rel=1e-3)
        assert [m.bound for m in some.exact] == pytest.approx([m.distance for m in some.exact], rel=1e-3)
        assert any_.least > 5 * all_of_them.least > 0
        assert all_of_them.n_tokens == VOCAB - 1


def test_closest_tokens_are_members_of_the_closest_pairs_of_rows() -> None:
    lm = LanguageModel(tiny_model("gpt2"))
    rows = lm.embeddings.rows(torch.arange(VOCAB)).double()
    expected: list[int] = []
    plain, units = (brute(each, 8 * 9) for each in (rows, rows / rows.norm(dim=1, keepdim=True)))
    for one, two in zip(plain, units, strict=True):
        expected += [*one[1:], *two[1:]]
    got = closest_tokens(lm, torch.arange(VOCAB), 9, torch.Generator().manual_seed(0))
    assert got.tolist() == list(dict.fromkeys(expected))[:9]
    some = closest_tokens(lm, torch.arange(40, 60), 20, torch.Generator().manual_seed(0))
    assert sorted(some.tolist()) == list(range(40, 60))


def test_memory_for_few_cuts_at_a_time_changes_no_margin(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = [random_ids(3, seed=1)]
    at_once = survey_margins(lm, prefixes, CUTS, n_tokens=None)
    monkeypatch.setattr("sipit.collisions.margins._BYTES", 1)
    one_by_one = survey_margins(lm, prefixes, CUTS, n_tokens=None)
    assert [layer.least_tokens for layer in one_by_one] == [layer.least_tokens for layer in at_once]
    assert [layer.least for layer in one_by_one] == pytest.approx([layer.least for layer in at_once], rel=1e-4)


@pytest.mark.parametrize("pick", ["near", "random"])
def test_margins_go_on_from_their_log(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pick: Pick
) -> None:
    prefixes = [random_ids(3, seed=n) for n in range(4)]
    log, cuts = tmp_path / "margins.jsonl", CUTS[:2]
    plain = survey_margins(lm, prefixes, cuts, n_tokens=9, pick=pick, n_exhaustive=2)
    seen: list[tuple[int, int]] = []

    def stop_in_the_second(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 9 + lm.vocab_size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey_margins(lm, prefixes, cuts, n_tokens=9, pick=pick, n_exhaustive=2, log=log, on_step=stop_in_the_second)
    assert len(log.read_text(encoding="utf-8").splitlines()) == 3  # settings, some and all tokens of the first prefix
    again: list[tuple[int, int]] = []
    whole = survey_margins(
        lm, prefixes, cuts, n_tokens=9, pick=pick, n_exhaustive=2, log=log, on_step=lambda *step: again.append(step)
    )
    assert whole == plain
    assert again[0][0] > 9 + lm.vocab_size - 2  # what was known is counted, and not run
    assert again[-1][0] == again[-1][1] == seen[-1][1]
    monkeypatch.setattr("sipit.collisions.margins.continued_states", None)  # nothing is left to run
    assert survey_margins(lm, prefixes, cuts, n_tokens=9, pick=pick, n_exhaustive=2, log=log) == plain
    with pytest.raises(MismatchError, match="other prefixes"):
        survey_margins(lm, prefixes[::-1], cuts, n_tokens=9, pick=pick, log=log)
    monkeypatch.setattr("sipit.collisions.margins.closest_tokens", None)  # refused before tokens are searched
    with pytest.raises(MismatchError, match="other options"):
        survey_margins(lm, prefixes, cuts, n_tokens=8, pick=pick, log=log)
