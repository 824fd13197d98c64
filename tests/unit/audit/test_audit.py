"""Audits: cells, intervals, defences, resuming."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from sipit import LanguageModel
from sipit.audit import Plan, Trial, audit, cells_of, defence_named, dumps, given_away, wilson
from sipit.audit.defences import Scene
from sipit.audit.fisher import fisher_diagonal
from sipit.audit.utility import utility_of
from sipit.errors import OptionError
from sipit.observations import Cut, Observation, read_observation, write_observation
from sipit.observations.formats import Wanted
from tests.tiny_models import random_ids, text_model

PROMPTS = [random_ids(8, seed=seed, vocab_size=256) for seed in (1, 2)]
CELL_KEYS = {
    *("layer", "site", "dtype", "defence", "strength", "prompts", "exact_prompts", "tokens", "exact_tokens"),
    *("low", "high", "wall_ratio", "kl", "agreement"),
}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model()


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (3, 7), (40, 50)])
def test_wilson_is_scipys(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high))


def test_bare_states_give_prompts_away_and_noise_hides_them(lm: LanguageModel, tmp_path: Path) -> None:
    cells, trials = audit(lm, PROMPTS, cuts=[(2, "block")], folder=tmp_path, defences=["none", "gaussian:20"])
    bare, hidden = cells
    assert set(bare.record()) >= CELL_KEYS
    assert (bare.prompts, bare.exact_prompts, bare.tokens, bare.exact_tokens) == (2, 2, 16, 16)
    assert (bare.kl, bare.agreement) == (0.0, 1.0)
    assert hidden.exact_prompts == 0
    assert hidden.kl is not None
    assert hidden.kl > 0.01
    assert given_away(cells) == 1.0
    assert len(trials) == 4


def test_an_audit_goes_on_where_it_stopped(lm: LanguageModel, tmp_path: Path) -> None:
    first: list[Trial] = []
    audit(lm, PROMPTS[:1], cuts=[(1, "block")], folder=tmp_path, on_trial=first.append)
    more: list[Trial] = []
    cells, _ = audit(lm, PROMPTS, cuts=[(1, "block")], folder=tmp_path, on_trial=more.append)
    assert [len(first), len(more)] == [1, 1]
    assert cells[0].prompts == 2
    lines = (tmp_path / "trials.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["exact_tokens"] for line in lines] == [8, 8]


@pytest.mark.parametrize(
    "text",
    ["dropping:0.2", "rounding:8", "rounding:3", "dp-gaussian:100", "gaussian:0.1", "rotation", "inverse-fisher:0.1"],
)
def test_each_defence_changes_rows_and_keeps_their_shape(lm: LanguageModel, text: str) -> None:
    seen = lm.capture(input_ids=PROMPTS[0], layer=2)
    defence, strength = defence_named(text)
    sent, again = (
        defence.apply(Scene(lm=lm, seen=seen, generator=torch.Generator().manual_seed(0)), strength).seen
        for _ in range(2)
    )
    assert sent.states.shape == seen.states.shape
    assert not torch.equal(sent.states.float(), seen.states)
    assert torch.equal(sent.states, again.states)


@pytest.mark.parametrize("text", ["rotation", "mixing:0", "mixing:3"])
def test_a_secret_linear_map_hides_nothing(lm: LanguageModel, tmp_path: Path, text: str) -> None:
    (cell,), (trial,) = audit(lm, PROMPTS[:1], cuts=[(2, "block")], folder=tmp_path, defences=[text])
    assert (trial.verdict, trial.is_exact, cell.agreement) == ("recovered", True, 1.0)
    assert "".join(one["token"] for one in trial.shown) == lm.decode(PROMPTS[0].tolist())


def test_fisher_information_is_the_curvature_of_the_models_own_answer(lm: LanguageModel) -> None:
    """Noise that spends a small budget costs about that many nats a token; ten times as much is far off."""
    cut, generator = Cut(2), torch.Generator().manual_seed(0)
    spread = (2 * 0.01 / (lm.d_model * fisher_diagonal(lm, cut))).sqrt()
    costs = []
    for seed in range(12):
        seen = lm.capture(input_ids=random_ids(12, seed=seed, vocab_size=256), layer=2)
        noise = spread * torch.randn(seen.states.shape, generator=generator, dtype=torch.float64)
        found = utility_of(lm, seen, replace(seen, states=(seen.states + noise).float()))
        assert found is not None
        costs.append(found.kl)
    assert 0.003 < sum(costs) / len(costs) < 0.03
    with pytest.raises(OptionError, match="site block"):
        fisher_diagonal(lm, Cut(3, "final"))


@pytest.mark.thorough
@pytest.mark.parametrize("text", ["dropping:0.2", "dropping:0.6", "clipping:1", "clipping:0.01"])
def test_values_that_are_dropped_or_cut_hide_nothing(lm: LanguageModel, tmp_path: Path, text: str) -> None:
    cells, (trial,) = audit(lm, PROMPTS[:1], cuts=[(2, "block")], folder=tmp_path, defences=[text])
    if text == "clipping:0.01":  # signs are all that is left
        assert trial.verdict != "recovered"
    else:
        assert (trial.verdict, trial.exact_tokens) == ("recovered", 8)
    assert cells[0].agreement is not None


@pytest.mark.parametrize("text", ["gauss:1", "gaussian", "gaussian:x", "rounding:1", "rounding:2.5", "dropping:1"])
def test_bad_defences_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"choose one of|no strength"):
        defence_named(text)


def test_utility_of_rows_as_they_are_is_whole(lm: LanguageModel) -> None:
    seen = lm.capture(input_ids=PROMPTS[0], layer=2)
    found = utility_of(lm, seen, seen)
    assert found is not None
    assert (found.kl, found.agreement) == (0.0, 1.0)
    keys = lm.capture(input_ids=PROMPTS[0], layer=1, site="keys")
    assert utility_of(lm, keys, keys) is None


def test_cells_without_trials_are_left_out() -> None:
    plan = Plan(layer=1, site="block", dtype="float32", defence="none", strength=0.0)
    assert cells_of([plan], []) == []
    assert given_away([]) == 0.0


@pytest.mark.thorough
def test_states_of_a_pass_in_another_dtype_are_a_cell_of_their_own(tmp_path: Path) -> None:
    lm = text_model()
    audit(lm, PROMPTS[:1], cuts=[(2, "block")], folder=tmp_path)
    cells, trials = audit(lm, PROMPTS[:1], cuts=[(2, "block")], folder=tmp_path, pass_dtype="float16")
    assert [(one.exact_prompts, one.plan.stored) for one in cells] == [(1, "float32 of a float16 pass")]
    assert [trial.verdict for trial in trials if trial.cell == cells[0].plan.key] == ["recovered"]
    in_half = LanguageModel(copy.deepcopy(lm.model).half(), lm.tokenizer)
    write_observation(in_half.capture(input_ids=PROMPTS[0], layer=2), tmp_path / "dump")
    by_dtype = [dumps.audit_dumps(lm, [tmp_path / "dump"], Wanted(), pass_dtype=dtype) for dtype in ("float16", None)]
    assert [one.trials[0].verdict for one in by_dtype] == ["recovered", "unmatched"]
    assert [one.cells[0].plan.stored for one in by_dtype] == ["float16 of a float16 pass", "float16"]
    with pytest.raises(OptionError, match="dtype out"):
        audit(lm, PROMPTS, cuts=[(2, "block")], folder=tmp_path, defences=["clipping:3"], pass_dtype="float16")


def test_dumps_are_read_as_they_are_come_to_and_refused_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = text_model()
    names = ["a", "b", "broken", "c", "other", "d"]
    for name in names:
        seen = lm.capture(input_ids=random_ids(4, seed=len(name)), layer=2)
        write_observation(replace(seen, layer=99) if name == "other" else seen, tmp_path / name)
    (tmp_path / "broken").write_bytes(b"\\0" * 40)
    read: list[str] = []

    def noted(path: Path) -> Observation:
        read.append(path.name)
        return read_observation(path)

    monkeypatch.setattr(dumps, "read_observation", noted)
    read_at: list[int] = []
    paths = [tmp_path / name for name in names]
    found = dumps.audit_dumps(lm, paths, Wanted(), on_trial=lambda _: read_at.append(len(read)))
    assert [trial.verdict for trial in found.trials] == ["recovered"] * 4
    assert [name for name, _ in found.refused] == ["broken", "other"]
    assert read_at == [1, 2, 4, 6]
