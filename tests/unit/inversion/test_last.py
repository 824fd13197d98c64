"""The whole prompt from its last token's state: exact, or not found; never another one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sipit
from sipit import LanguageModel, Observation
from sipit.errors import OptionError, ShapeError
from sipit.inversion import LastProgress, certificate_of, check_certificate, invert_last
from sipit.inversion.last.additive import metric_of, together
from sipit.inversion.last.decode import read_anew
from sipit.inversion.last.judge import LastJudge
from tests.tiny_models import VOCAB, random_ids, text_model

TEXTS = ["ab", "c\n", "xyz"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model(bos=False)


@pytest.mark.thorough
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_short_prompt_comes_back_from_one_vector(lm: LanguageModel, text: str, layer: int) -> None:
    seen = lm.capture(text, layer=layer)
    found = sipit.invert_last(lm, seen.states[-1], layer=layer, max_tokens=3, use_fit=False)
    assert (found.verdict, found.text) == ("recovered", text)
    assert [p.is_held for p in found.positions] == [False] * (len(text) - 1) + [True]
    assert found.positions[-1].distance <= found.positions[-1].tolerance
    assert f"{len(text)} of {len(text)} tokens" in found.summary()


def test_what_is_proposed_does_not_depend_on_what_ran_before() -> None:
    tried = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # of the generator that all of a process share
        lm = text_model(bos=False)
        tried.append(invert_last(lm, _last(lm, "to"), max_tokens=3, use_fit=False).n_checked)
    assert tried[0] == tried[1]


def test_answer_is_the_only_one_of_all_prompts(llama: LanguageModel) -> None:
    ids = random_ids(2, seed=9)
    seen = llama.capture(input_ids=ids, layer=2).last_rows(1)
    found = invert_last(llama, seen, max_tokens=2, use_fit=False)
    every = [torch.arange(VOCAB)[:, None], torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))]
    within = [
        tuple(row.tolist())
        for prompts in every
        for row, state in zip(prompts, llama.cut(seen.cut).ordinary_batch(prompts)[:, -1], strict=True)
        if float((state - seen.states[0]).norm()) <= found.tolerance
    ]
    assert within == [found.input_ids] == [tuple(ids.tolist())]


def test_token_that_repeats_is_ambiguous(llama: LanguageModel) -> None:
    """Behind rotary positions a token repeated any number of times leaves one state, up to rounding."""
    seen = llama.capture(input_ids=[5, 5, 5], layer=2)
    found = invert_last(llama, seen.states[-1], layer=2, max_tokens=3, use_fit=False)
    assert found.verdict == "ambiguous"
    assert {found.input_ids, *found.other_prompts} == {(5,), (5, 5), (5, 5, 5)}
    assert "2 other prompts fit as well" in found.summary()
    known = invert_last(llama, seen.states[-1], layer=2, length=2, use_fit=False)
    assert (known.verdict, known.input_ids) == ("recovered", (5, 5))


@pytest.mark.thorough
def test_what_is_no_state_is_not_found_and_the_record_says_so(lm: LanguageModel) -> None:
    state = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = invert_last(lm, state, layer=2, max_tokens=2, seconds=1.5, use_fit=False)
    assert found.verdict == "unmatched"
    assert found.input_ids == ()
    assert found.miss is not None
    assert "within 1.5 s" in found.miss.diagnosis
    (nearest,) = found.other_prompts
    own = lm.capture(input_ids=list(nearest), layer=2).states[-1]
    assert found.miss.distance == pytest.approx(float((own - state).norm()), rel=1e-3)
    assert found.summary() == f"unmatched: {found.miss.diagnosis}."
    assert not check_certificate(certificate_of(found), _last(lm, "ab"), lm).holds


def _last(lm: LanguageModel, text: str) -> Observation:
    return lm.capture(text, layer=2).last_rows(1)


@pytest.mark.thorough
def test_state_of_a_prompt_one_token_away_is_never_taken(lm: LanguageModel) -> None:
    """What is sought lies outside the lengths allowed; neighbours of it must not do in its place."""
    for text in ("abcd", "bbcd", "xbcd"):
        found = invert_last(lm, _last(lm, text), max_tokens=3, seconds=1, use_fit=False)
        assert found.verdict == "unmatched"


@pytest.mark.thorough
def test_last_rows_and_known_lengths(lm: LanguageModel) -> None:
    whole = lm.capture("xyz", layer=2)
    two = invert_last(lm, whole.states[-2:], layer=2, length=3, use_fit=False)
    assert (two.verdict, two.text) == ("recovered", "xyz")
    one = replace(whole, states=whole.states[2:], positions=(2,))
    again = sipit.invert(lm, one, use_fit=False)
    assert (again.verdict, again.text, again.seq_len) == ("recovered", "xyz", 3)


@pytest.mark.thorough
def test_invert_takes_the_way_of_last_rows(lm: LanguageModel) -> None:
    seen = _last(lm, "ab")
    assert sipit.invert(lm, seen, use_fit=False).text == "ab"
    with pytest.raises(OptionError, match="leave them out"):
        sipit.invert(lm, seen, exhaustive=True)
    with pytest.raises(OptionError, match="unknown length"):
        sipit.invert(lm, seen, known_prefix=[1])


def test_certificate_holds_after_files_and_forged_ones_do_not(lm: LanguageModel, tmp_path: Path) -> None:
    sipit.write_observation(_last(lm, "ab"), tmp_path / "seen")
    seen = sipit.read_observation(tmp_path / "seen")
    assert seen.is_last
    record = certificate_of(invert_last(lm, seen, use_fit=False))
    assert check_certificate(record, seen, lm).holds
    assert not check_certificate(record, _last(lm, "bb"), lm).holds


def test_other_prompts_of_a_certificate_are_run(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=[5, 5], layer=2).last_rows(1)
    found = invert_last(llama, seen, max_tokens=2, use_fit=False)
    assert found.verdict == "ambiguous"
    assert check_certificate(certificate_of(found), seen, llama).holds
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"other_prompts": ((6,),)}, "does not fit"),
        ({"other_prompts": ((),)}, "does not fit"),
        ({"other_prompts": ((10**9,),)}, "does not fit"),
        ({"verdict": "recovered"}, "not 'recovered'"),
    ]
    for changes, reason in wrong:
        check = check_certificate(certificate_of(replace(found, **changes)), seen, llama)
        assert not check.holds
        assert reason in check.reasons[0]


def test_progress_tells_of_the_nearest(lm: LanguageModel) -> None:
    told: list[LastProgress] = []
    found = invert_last(lm, _last(lm, "ab"), use_fit=False, on_progress=told.append)
    assert told[-1].n_tried <= found.n_checked
    assert [t.n_tried for t in told] == sorted(t.n_tried for t in told)
    assert told[-1].nearest == found.input_ids


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"length": 0}, {"max_tokens": 99}, {"seconds": 0.0}])
def test_options_out_of_range_are_refused(lm: LanguageModel, wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        invert_last(lm, _last(lm, "ab"), **wrong)


def test_what_is_no_vector_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ShapeError):
        invert_last(lm, torch.zeros(3, 2, 32), layer=2)
    with pytest.raises(ShapeError):
        invert_last(lm, torch.zeros(7), layer=2)
    with pytest.raises(ShapeError, match="object"):
        invert_last(lm, object(), layer=2)
    with pytest.raises(OptionError, match="without a hole"):
        lm.capture("abcd", layer=2).last_rows(5)


def test_changes_that_add_up_are_found_together() -> None:
    """In a model whose last state is the sum of its tokens' vectors, two wrong tokens are mended in one go."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(4, 50, 16, generator=generator)  # (T, V, W)

    class Sum:
        last_row = vectors[torch.arange(4), torch.tensor([7, 8, 9, 10])].sum(dim=0)

        def run(self, ids: torch.Tensor) -> torch.Tensor:
            return vectors[torch.arange(4), ids].sum(dim=1)

    judge: Any = Sum()
    tokens = torch.arange(50).expand(4, 50)
    for start in ((7, 1, 9, 2), (1, 8, 2, 3), (4, 3, 2, 1)):
        made = list(together(judge, start, tokens, metric_of(torch.randn(400, 16, generator=generator))))
        assert (7, 8, 9, 10) in made
        assert len(made) == len(set(made))


def test_judge_measures_as_the_ordinary_pass_does(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=random_ids(3, seed=1), layer=2).last_rows(1)
    judge = LastJudge(lm=llama, seen=seen, budget=float("inf"))
    prompts = [tuple(random_ids(3, seed=seed).tolist()) for seed in range(2, 40)]
    judge.score(prompts)
    assert not judge.fitting
    nearest = judge.nearest(4)
    for prompt in nearest:
        own = llama.capture(input_ids=list(prompt), layer=2).states[-1]
        assert judge.tried[prompt] == pytest.approx(float((own - seen.states[-1]).norm()), rel=1e-4)


def test_beam_search_over_everything_is_the_full_ranking(lm: LanguageModel) -> None:
    """With a beam as wide as the vocabulary, prompts of two tokens come in the order of their log-probabilities."""

    class Reader:
        class network:  # noqa: N801 - stands for an attribute
            vocab_size = 5

        def next_log_probabilities(self, white: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            seeds = [sum((i + 1) * 7**k for k, i in enumerate(row)) for row in read.tolist()]
            rows = [torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            return torch.stack(rows).log_softmax(dim=1)

    reader: Any = Reader()
    ranked = read_anew(reader, torch.zeros(1, 4), [()], n_beams=25, lengths=range(2, 3))

    def log(prompt: tuple[int, ...]) -> float:
        total = 0.0
        read: list[int] = []
        for token in (*prompt[::-1], 5):
            logs = reader.next_log_probabilities(torch.zeros(1, 4), torch.tensor([read]).long().view(1, -1))
            total += float(logs[0, token])
            read.append(token)
        return total

    every = sorted(itertools.product(range(5), repeat=2), key=log, reverse=True)
    assert ranked == every


def test_observations_of_last_rows_go_through_a_file_of_several(lm: LanguageModel, tmp_path: Path) -> None:
    from sipit.inversion import LastOptions, invert_many
    from sipit.observations import read_observations, write_observations

    write_observations([_last(lm, "ab"), lm.capture("whole", layer=2)], tmp_path / "both")
    both = [seen for _, seen in read_observations(tmp_path / "both")]
    assert [seen.is_last for seen in both] == [True, False]
    found = list(invert_many(lm, both, last=LastOptions(max_tokens=2)))
    assert [one.text for one in found] == ["ab", "whole"]
    assert json.loads(json.dumps(found[0].record()))["other_prompts"] == []
