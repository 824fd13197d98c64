"""What is decided about a position, by what was checked there."""

from __future__ import annotations

import pytest
import torch

from sipit import LanguageModel
from sipit.inversion.evidence.result import Miss
from sipit.inversion.judging.check import PackedCheck
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.tolerance import tolerance_for
from sipit.inversion.proposals import SearchView
from sipit.inversion.search.accept_rule import Accept, AcceptRule, Retry
from sipit.inversion.search.trials import Trials, outcomes_of
from sipit.observations import Cut
from tests.tiny_models import random_ids, tiny_model

LAYER = 2
RIGHT, TWIN, WRONG = 90, 20, 33
IDS = torch.tensor([*random_ids(4, seed=4).tolist(), RIGHT])
PREFIX = IDS[:4]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    model = tiny_model("llama")
    rows = model.get_input_embeddings().weight.data
    rows[TWIN] = rows[RIGHT]
    return LanguageModel(model, name="llama")


def _rule(lm: LanguageModel, *, exhaustive: bool = False, max_batch: int = 64) -> AcceptRule:
    """Return a rule for the last position, with the true prefix accepted."""
    seen = lm.capture(input_ids=IDS, layer=LAYER)
    row = lm.cut(Cut(LAYER)).row(PREFIX)
    meter = Meter()
    check = PackedCheck(lm, seen, tolerance_for(lm, seen), meter, noise=0.0, row=row)
    view = SearchView(
        lm=lm,
        seen=seen,
        check=check,
        meter=meter,
        generator=torch.Generator(),
        price=16.0,
        values=check.observed,
        is_held=torch.ones(len(IDS), dtype=torch.bool),
        prefix=PREFIX.tolist(),
    )
    return AcceptRule(view, exhaustive, max_batch)


def _tried(rule: AcceptRule, *token_ids: int) -> Trials:
    tried = Trials(rule.view.lm.vocab_size)
    ids = torch.tensor(token_ids)
    tried.add(outcomes_of(rule.view.check.run(ids, torch.full_like(ids, len(PREFIX)))))
    return tried


def test_a_token_is_accepted_once_what_may_fit_beside_it_was_checked(lm: LanguageModel) -> None:
    rule = _rule(lm)
    first = rule.after_pass(_tried(rule, RIGHT, WRONG), [RIGHT, WRONG], is_settling=False)
    assert isinstance(first, Retry)
    assert first.token_ids.tolist() == [RIGHT, TWIN]
    tried = _tried(rule, RIGHT, WRONG, TWIN)
    decision = rule.after_pass(tried, [RIGHT, TWIN], is_settling=True)
    assert isinstance(decision, Accept)
    assert decision.best.token_id in (RIGHT, TWIN)
    assert {i for i, _ in tried.rivals(decision.best.token_id)} == {RIGHT, TWIN} - {decision.best.token_id}


def test_with_room_for_one_token_a_pass_checks_what_is_untried_alone(lm: LanguageModel) -> None:
    rule = _rule(lm, max_batch=1)
    decision = rule.after_pass(_tried(rule, RIGHT), [RIGHT], is_settling=False)
    assert isinstance(decision, Retry)
    assert decision.token_ids.tolist() == [TWIN]


def test_a_token_that_the_last_pass_did_not_run_is_run_again(lm: LanguageModel) -> None:
    rule = _rule(lm)
    decision = rule.after_pass(_tried(rule, RIGHT, TWIN), [TWIN], is_settling=True)
    if isinstance(decision, Accept):  # the twin came out nearest
        assert decision.best.token_id == TWIN
    else:
        assert isinstance(decision, Retry)
        assert decision.token_ids.tolist() == [RIGHT]


def test_nothing_is_accepted_before_the_whole_vocabulary_was_tried_where_that_is_asked_for(lm: LanguageModel) -> None:
    rule = _rule(lm, exhaustive=True)
    assert rule.tries_all
    assert rule.after_pass(_tried(rule, RIGHT, TWIN), [RIGHT, TWIN], is_settling=False) is None


def test_wrong_tokens_alone_are_nothing_yet_and_a_miss_at_the_end(lm: LanguageModel) -> None:
    rule = _rule(lm)
    tried = _tried(rule, WRONG, WRONG + 1)
    assert rule.after_pass(tried, [WRONG, WRONG + 1], is_settling=False) is None
    miss = rule.at_the_end(tried)
    assert isinstance(miss, Miss)
    assert miss.n_checked == 2
    assert miss.tolerance < miss.distance
    assert miss.diagnosis
