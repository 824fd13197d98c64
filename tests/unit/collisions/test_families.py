"""Families hold different prompts that say what they are, and their closest pairs are the true ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sipit import LanguageModel
from sipit.collisions import capture_states, closest_pairs
from sipit.collisions.families import Member, family_prompts, sample_texts, similar_texts, survey_families
from sipit.errors import OptionError
from sipit.observations import Cut
from tests.tiny_models import byte_tokenizer, embedding_rows, random_ids, text_model, tiny_model, true_states

TEXTS = ["First one. Then two! Last three?", "def f(x):\n    return x\n"]
COUNTS = (1, 2, 7)
CUTS: list[Cut] = [Cut(1, "block"), Cut(3, "block")]


def _members(*prompts: Sequence[int]) -> list[Member]:
    return [Member(ids=torch.tensor(ids), label=str(i)) for i, ids in enumerate(prompts)]


def test_no_two_members_of_a_family_have_the_same_tokens() -> None:
    families = family_prompts(text_model(), [*TEXTS, TEXTS[0]], counts=COUNTS)
    assert len(families) == 8
    for name, members in families.items():
        ids = [tuple(member.ids.tolist()) for member in members]
        assert len(set(ids)) == len(ids) > 1, name
    once = family_prompts(text_model(), TEXTS, counts=COUNTS)
    assert {name: len(members) for name, members in families.items()} == {n: len(m) for n, m in once.items()}


def test_members_are_the_texts_they_are_said_to_be() -> None:
    lm = text_model()
    families = family_prompts(lm, TEXTS[:1], counts=COUNTS)

    def texts(name: str) -> set[str]:
        return {str(lm.decode(member.ids)).removeprefix("<s>") for member in families[name]}

    text = TEXTS[0]
    assert texts("trailing_newlines") == {text + "\n" * n for n in (0, *COUNTS)}
    assert texts("trailing_spaces") == {text + " " * n for n in (0, *COUNTS)}
    parts = ["First one.", "Then two!", "Last three?"]
    assert texts("sentence_order") == {" ".join(order) for order in itertools.permutations(parts)}
    assert texts("repeated_ending") == {text + "?" * n for n in COUNTS}
    assert {tuple(member.ids.tolist()) for member in families["repeated_token"]} == {(30,) * n for n in COUNTS}
    assert len(texts("one_digit")) == 91
    assert {text.upper(), text.lower(), "first" + text[5:], text[:6] + "ONE" + text[9:]} <= texts("case")
    assert "First one. Then two!\tLast three?" in texts("delimiter")


def test_similar_samples_are_put_in_every_order_as_sentences() -> None:
    lm = text_model()
    similar = ["one two ", "three.", "four", "five"]
    families = family_prompts(lm, TEXTS[:1], similar=similar, counts=COUNTS, max_sentences=3)
    texts = {str(lm.decode(member.ids)).removeprefix("<s>") for member in families["sample_order"]}
    assert texts == {" ".join(order) for order in itertools.permutations(["one two.", "three.", "four."])}
    assert "sample_order" not in family_prompts(lm, TEXTS[:1], similar=similar[:1], counts=COUNTS)


@pytest.mark.parametrize("bos", [False, True])
def test_similar_texts_are_the_closest_pairs_of_a_survey(tmp_path: Path, bos: bool) -> None:
    lm = text_model(bos=bos)
    written = [f"{a}{b}{c}" for a, b, c in itertools.product("xyz", "pq", "mn")]
    folder = capture_states(lm, [lm.encode(text) for text in written], [Cut(2, "block")], tmp_path)
    states = torch.stack([lm.capture(text, layer=2).states[-1] for text in written]).double()
    gaps = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    first, second = divmod(int(gaps.argmin()), len(written))
    assert set(similar_texts(lm, folder, Cut(2, "block"), n=2)) == {written[first], written[second]}
    assert set(similar_texts(lm, folder, Cut(2, "block"), n=99)) == set(written)
    ((one, two),) = closest_pairs(folder, Cut(2, "block"), n=1)
    assert {tuple(one.tolist()), tuple(two.tolist())} == {
        tuple(lm.encode(written[i]).tolist()) for i in (first, second)
    }


def test_prompts_longer_than_the_model_has_positions_for_are_left_out() -> None:
    model = tiny_model("gpt2", vocab_size=260, n_positions=64)
    lm = LanguageModel(model, byte_tokenizer())
    families = family_prompts(lm, TEXTS[:1], counts=(1, 40, 64, 65))
    lengths = {name: {len(member.ids) for member in members} for name, members in families.items()}
    assert lengths["repeated_token"] == {1, 40, 64}
    assert max(map(max, lengths.values())) == 64


def test_closest_pairs_are_those_of_full_forward_passes() -> None:
    lm = text_model()
    members = _members(*(random_ids(5 + i % 3, seed=i).tolist() for i in range(9)))
    texts = [lm.decode(member.ids) for member in members]
    for result in survey_families(lm, {"mixed": members}, CUTS, k=2, threshold=5.0):
        key = Cut(result.layer, result.site)
        states = [_last(lm, member, key) for member in members]
        gaps = sorted(
            (float((states[i] - states[j]).norm()), i, j) for i, j in itertools.combinations(range(len(states)), 2)
        )
        assert result.n_pairs == len(gaps)
        assert result.n_collisions == sum(gap <= 5.0 for gap, _, _ in gaps)
        for pair, (gap, i, j) in zip(result.pairs, gaps, strict=False):
            assert (pair.first_ids, pair.second_ids) == (members[i].ids.tolist(), members[j].ids.tolist())
            assert (pair.first_text, pair.second_text) == (texts[i], texts[j])
            assert (pair.first_label, pair.second_label) == (str(i), str(j))
            assert pair.distance == pytest.approx(gap, rel=1e-4)


def _last(lm: LanguageModel, member: Member, key: Cut) -> torch.Tensor:
    model = lm.model
    if key[0] < lm.n_layers:
        with torch.no_grad():
            output = model(input_ids=member.ids[None], output_hidden_states=True)
        last: torch.Tensor = output.hidden_states[key[0]][0, -1]
    else:
        norm: torch.nn.Module = model.model.norm  # type: ignore[assignment]
        seen: list[torch.Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1]))
        with torch.no_grad():
            model(input_ids=member.ids[None])
        hook.remove()
        last = seen[0]
    return last.double()


def test_one_token_repeated_collides_under_rotary_positions_without_bos() -> None:
    """In exact arithmetic; float32 gives distances of rounding, which the threshold alone would pass over."""
    model = tiny_model("llama").double()
    members = _members(*([11] * n for n in (1, 2, 3, 30)))
    (result,) = survey_families(LanguageModel(model), {"runs": members}, [Cut(4, "block")])
    assert result.n_collisions == 6
    model = tiny_model("llama").double()
    behind = _members(*([0] + [11] * n for n in (1, 2, 3, 30)))
    (result,) = survey_families(LanguageModel(model), {"runs": behind}, [Cut(4, "block")])
    assert result.n_collisions == 0
    truth = true_states(model, "llama", behind[0].ids)[Cut(4, "block")][-1]
    assert float(truth.norm()) > 1


def test_states_that_are_not_finite_are_counted_and_never_collide() -> None:
    model = tiny_model("llama", vocab_size=260)
    embedding_rows(model)[5] = float("inf")
    lm = LanguageModel(model)
    families = {"broken": _members([5, 1], [5, 2], [5, 3], [6, 1], [7, 1])}
    (result,) = survey_families(lm, families, [Cut(2, "block")])
    assert (result.n_prompts, result.n_not_finite, result.n_pairs, result.n_collisions) == (5, 3, 1, 0)


def test_results_are_json_and_progress_reaches_its_end() -> None:
    steps: list[tuple[int, int]] = []
    families = family_prompts(text_model(), TEXTS, counts=(1, 2))
    results = survey_families(text_model(), families, CUTS, on_step=lambda done, total: steps.append((done, total)))
    assert [(r.family, r.layer) for r in results] == [(name, layer) for name in families for layer, _ in CUTS]
    json.dumps([dataclasses.asdict(result) for result in results], allow_nan=False)
    total = sum(map(len, families.values()))
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})


@pytest.mark.thorough
def test_sample_texts_are_prose_of_several_sentences_and_code() -> None:
    texts = sample_texts(n_prose=2, n_code=1)
    assert len(texts) == 3
    assert texts == sample_texts(n_prose=2, n_code=1)
    assert texts[2].startswith("def ")
    assert all(120 <= len(text) <= 320 for text in texts)


@pytest.mark.parametrize(("texts", "counts"), [([], (1,)), (["a"], (0,))])
def test_no_text_or_a_count_of_zero_is_refused(texts: list[str], counts: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="one text or more"):
        family_prompts(text_model(), texts, counts=counts)
