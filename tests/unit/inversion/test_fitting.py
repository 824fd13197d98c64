"""The fitted inverse: it learns, it resumes, and whatever it says, the check decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sipit import LanguageModel, invert
from sipit.inversion.fitting import FitProgress, Recipe, fit_inverse
from sipit.inversion.inverses.store import fit_path, load_fit
from sipit.observations import Cut
from tests.tiny_models import N_LAYERS, VOCAB, random_ids, text_model, tiny_model

pytestmark = pytest.mark.xdist_group("fitting")  # its fits are made once, in one process
_RECIPE = Recipe(n_windows=400, length=24, d_hidden=128, batch_size=128, epochs=6, n_negatives=64, learning_rate=3e-3)
_CUT: Cut = Cut(1, "block")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIPIT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def fitted(cache: Path) -> LanguageModel:
    """A tiny model with a fit at two cuts."""
    lm = LanguageModel(tiny_model("llama", seed=5), name="fitted")
    fit_inverse(lm, [_CUT, Cut(N_LAYERS, "final")], recipe=_RECIPE)
    return lm


def _retouched(path: Path, **changes: torch.Tensor) -> bytes:
    """Overwrite tensors of a fit, keeping its metadata; return the file as it was."""
    from safetensors import safe_open

    before = path.read_bytes()
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
    tensors = {**load_file(path), **changes}
    save_file(tensors, path, metadata=metadata)
    return before


def test_fit_ranks_the_right_token_far_better_than_chance(fitted: LanguageModel) -> None:
    fit = load_fit(fitted, _CUT)
    assert fit is not None
    assert fit.report["held_out"]["random ids"]["alone"]["mean_rank"] < VOCAB / 5  # chance: VOCAB / 2


def test_layer_named_twice_is_fitted_once(cache: Path) -> None:
    lm = LanguageModel(tiny_model("llama", seed=7), name="twice")
    recipe = Recipe(n_windows=16, length=24, d_hidden=16, batch_size=64, epochs=1, n_negatives=32)
    assert list(fit_inverse(lm, [_CUT, _CUT], recipe=recipe)) == [_CUT]


def test_work_files_are_gone_after_a_fit(fitted: LanguageModel) -> None:
    assert sorted(p.name for p in fit_path(fitted, _CUT).parent.iterdir()) == [
        "block-1.safetensors",
        f"final-{N_LAYERS}.safetensors",
    ]


@pytest.mark.parametrize("cut", [_CUT, Cut(N_LAYERS, "final")])
def test_fitted_search_is_exact_and_cheaper(fitted: LanguageModel, cut: Cut) -> None:
    ids = random_ids(16, seed=3)
    seen = fitted.capture(input_ids=ids, layer=cut[0], site=cut[1])
    with_fit, without = invert(fitted, seen), invert(fitted, seen, policy="vocabulary")
    assert with_fit.input_ids == without.input_ids == tuple(ids.tolist())
    assert with_fit.verdict == "recovered"
    assert with_fit.n_checked < without.n_checked


@pytest.mark.parametrize("place", [1, 2, 5, 9])
def test_query_of_the_observed_state_in_its_own_place(fitted: LanguageModel, place: int) -> None:
    fit = load_fit(fitted, _CUT)
    assert fit is not None
    states = fitted.capture(input_ids=random_ids(10, seed=2), layer=_CUT[0]).states
    at_place = fit.network.queries_at(states, torch.tensor([place, place]), states[[place, place]])
    torch.testing.assert_close(at_place, fit.network.queries(states)[[place, place]])


def test_inverse_that_is_off_is_amended_by_what_it_missed(
    fitted: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fitted.capture(input_ids=random_ids(12, seed=8), layer=_CUT[0])
    monkeypatch.setattr("sipit.inversion.search.batching.pass_price", lambda *_: 0.5)  # candidates count, not passes
    fit = load_fit(fitted, _CUT)
    assert fit is not None
    noise = torch.randn(fit.network.linear.bias.shape, generator=torch.Generator().manual_seed(1))
    off = fit.network.linear.bias + noise
    before = _retouched(fit_path(fitted, _CUT), **{"network.linear.bias": off.half()})
    try:
        amended = invert(fitted, seen)
        monkeypatch.setattr("sipit.inversion.inverses.ridge._AMENDED", 0.0)
        as_it_was = invert(fitted, seen)
    finally:
        fit_path(fitted, _CUT).write_bytes(before)
    assert amended.input_ids == as_it_was.input_ids
    assert amended.n_checked < 0.8 * as_it_was.n_checked


@pytest.mark.parametrize("kind", ["shuffled", "zero", "huge", "backwards"])
def test_hostile_fit_costs_time_but_never_correctness(fitted: LanguageModel, kind: str) -> None:
    path = fit_path(fitted, _CUT)
    tensors = load_file(path)
    weight = tensors["network.linear.weight"]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(weight.numel(), generator=generator)
    hostile = {
        "shuffled": weight.flatten()[order].view_as(weight),
        "zero": torch.zeros_like(weight),
        "huge": weight * 1000,
        "backwards": -weight,
    }[kind]
    before = _retouched(path, **{"network.linear.weight": hostile})
    try:
        ids = random_ids(12, seed=8)
        found = invert(fitted, fitted.capture(input_ids=ids, layer=1))
    finally:
        path.write_bytes(before)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids.tolist()))


@pytest.mark.parametrize("name", ["network.linear.weight", "first.weight", "first.mean", "network.bias"])
def test_fit_with_a_nan_is_passed_over(fitted: LanguageModel, name: str) -> None:
    path = fit_path(fitted, _CUT)
    damaged = load_file(path)[name].clone()
    damaged.view(-1)[0] = float("nan")
    before = _retouched(path, **{name: damaged})
    try:
        assert load_fit(fitted, _CUT) is None
    finally:
        path.write_bytes(before)


def test_truncated_fit_is_passed_over(fitted: LanguageModel) -> None:
    path = fit_path(fitted, _CUT)
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    try:
        assert load_fit(fitted, _CUT) is None
    finally:
        path.write_bytes(before)


def test_fit_of_another_model_is_passed_over(fitted: LanguageModel) -> None:
    other = LanguageModel(tiny_model("llama", seed=6), name="other")
    target = fit_path(other, _CUT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(fit_path(fitted, _CUT).read_bytes())
    assert load_fit(other, _CUT) is None


class _StopError(Exception):
    pass


@pytest.mark.parametrize("phase", ["sampling", "capturing", "training block 1"])
def test_interrupted_fit_goes_on_to_the_same_weights(cache: Path, fitted: LanguageModel, phase: str) -> None:
    recipe = Recipe(n_windows=64, length=24, d_hidden=64, batch_size=16, epochs=1, n_negatives=32)
    seen_phases: list[tuple[str, int]] = []

    def watch(progress: FitProgress) -> None:
        seen_phases.append((progress.phase, progress.done))
        if progress.phase == phase and progress.done >= progress.total * 0.7:
            raise _StopError

    lm = LanguageModel(tiny_model("llama", seed=9), name="interrupted")
    whole = load_file(fit_inverse(lm, [_CUT], recipe=recipe)[_CUT])
    fit_path(lm, _CUT).unlink()
    with pytest.raises(_StopError):
        fit_inverse(lm, [_CUT], recipe=recipe, on_progress=watch)
    assert not fit_path(lm, _CUT).exists()
    resumed: list[tuple[str, int]] = []
    again = fit_inverse(lm, [_CUT], recipe=recipe, on_progress=lambda p: resumed.append((p.phase, p.done)))
    parts = load_file(again[_CUT])
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    if phase == "training block 1":
        assert min(done for name, done in resumed if name == phase) > 1
        assert all(name == phase for name, _ in resumed)


@pytest.mark.thorough
def test_fit_uses_text_where_there_is_a_tokenizer(cache: Path) -> None:
    lm = text_model(bos=True)
    recipe = Recipe(n_windows=40, length=48, d_hidden=32, batch_size=128, epochs=1, n_negatives=64)
    fit_inverse(lm, [Cut(1, "block")], recipe=recipe, texts=["some words of the user " * 40])
    fit = load_fit(lm, Cut(1, "block"))
    assert fit is not None
    assert set(fit.report["held_out"]) >= {"prose", "code", "random ids"}
    assert fit.report["fit_block_tokens"] > 0
