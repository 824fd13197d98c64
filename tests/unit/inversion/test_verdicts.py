"""What the search says: recovered, ambiguous or unmatched, and the evidence it gives for that."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import sipit
from sipit import LanguageModel, Observation, SipitError
from sipit.errors import MismatchError, NonFiniteError, OptionError, ShapeError, StorageError
from sipit.inversion import POLICIES, Inversion, Policy, Progress, SearchOptions, search_events
from sipit.inversion.proposals import vocabulary
from sipit.models import PackedRow
from tests.tiny_models import VOCAB, embedding_rows, random_ids, text_model, tiny_model, twin_model

FIRST, SECOND = 40, 97
IDS = torch.tensor([5, 88, FIRST, 120, 3, SECOND, 61])
PLAIN = random_ids(7, seed=8)
QUICK: tuple[Policy, ...] = ("auto", "likely", "vocabulary", "random")


@pytest.fixture(scope="module")
def twins() -> LanguageModel:
    return LanguageModel(twin_model("gpt2", FIRST, SECOND), name="gpt2")


def _no_longer_than(n: int) -> Callable[[Progress], None]:
    """Return a progress callback that ends a search which goes round in circles."""
    calls: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        calls.append(progress)
        assert len(calls) <= n, "the search does not end"

    return on_progress


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_tokens_with_one_embedding_are_named_both_whatever_the_policy(
    twins: LanguageModel, policy: Policy, layer: int
) -> None:
    found = sipit.invert(twins, twins.capture(input_ids=IDS, layer=layer), policy=policy)
    assert found.verdict == "ambiguous"
    assert len(found.input_ids) == len(IDS)
    for position, (token_id, evidence) in enumerate(zip(IDS.tolist(), found.positions, strict=True)):
        named = {evidence.token_id, *(rival.token_id for rival in evidence.rivals)}
        assert named == ({FIRST, SECOND} if token_id in (FIRST, SECOND) else {token_id}), position
    assert f"({FIRST})" in found.summary()
    assert f"({SECOND})" in found.summary()


@pytest.mark.parametrize("max_batch", [1, 2, 3])
def test_crowd_of_equal_tokens_ends_in_ambiguous_however_small_the_batch(max_batch: int) -> None:
    model = tiny_model("llama")
    rows = embedding_rows(model)
    rows[[20, 30, 50, 70]] = rows[10].clone()
    lm = LanguageModel(model)
    seen = lm.capture(input_ids=[1, 50, 2], layer=1)
    found = sipit.invert(lm, seen, policy="vocabulary", max_batch=max_batch, on_progress=_no_longer_than(4 * VOCAB))
    assert found.verdict == "ambiguous"
    assert found.positions[1].rivals
    assert {found.positions[1].token_id, *(r.token_id for r in found.positions[1].rivals)} <= {10, 20, 30, 50, 70}


@pytest.mark.parametrize("policy", POLICIES)
def test_embeddings_nearer_than_the_noise_are_ambiguous(policy: Policy) -> None:
    lm = LanguageModel(twin_model("llama", FIRST, SECOND, gap=2e-7))
    found = sipit.invert(lm, lm.capture(input_ids=IDS, layer=2), policy=policy)
    assert found.verdict == "ambiguous"
    assert {found.positions[2].token_id, found.positions[2].rivals[0].token_id} == {FIRST, SECOND}


@pytest.mark.parametrize("policy", QUICK)
@pytest.mark.parametrize("gap", [1e-3, 1e-2])
def test_embeddings_further_than_the_noise_are_told_apart(policy: Policy, gap: float) -> None:
    lm = LanguageModel(twin_model("llama", FIRST, SECOND, gap=gap))
    found = sipit.invert(lm, lm.capture(input_ids=IDS, layer=1), policy=policy)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))


def test_bfloat16_storage_makes_close_tokens_ambiguous_and_float32_tells_them_apart() -> None:
    lm = LanguageModel(twin_model("llama", FIRST, SECOND, gap=1e-4))
    for dtype, verdict in (("float32", "recovered"), ("bfloat16", "ambiguous")):
        seen = lm.capture(input_ids=IDS, layer=1, dtype=dtype)
        assert sipit.invert(lm, seen, policy="vocabulary", exhaustive=True).verdict == verdict


@pytest.mark.parametrize("policy", QUICK)
@pytest.mark.parametrize("k", [0, 3, 6])
def test_perturbed_position_ends_the_search_with_the_prefix_kept(llama: LanguageModel, policy: Policy, k: int) -> None:
    seen = llama.capture(input_ids=PLAIN, layer=2)
    states = seen.states.clone()
    states[k] += 0.3 * states[k].norm() * torch.nn.functional.normalize(torch.ones(32), dim=0)
    found = sipit.invert(llama, states, layer=2, policy=policy)
    assert found.verdict == "unmatched"
    assert found.input_ids == tuple(PLAIN[:k].tolist())
    assert len(found.positions) == k
    assert found.miss is not None
    assert (found.miss.position, found.miss.n_checked) == (k, VOCAB)
    assert found.miss.distance > found.miss.tolerance > 0
    assert found.summary().startswith(f"unmatched: position {k}: best of {VOCAB} candidates is ")


@pytest.mark.parametrize("is_missed", [False, True])
def test_record_and_sentence_give_one_tolerance(is_missed: bool) -> None:
    """A row a thousand times as long has a tolerance a thousand times as large, on which nothing rests."""
    model = tiny_model("llama")
    embedding_rows(model)[40] *= 1000
    lm = LanguageModel(model, name="one long row")
    states = lm.capture(input_ids=[9, 40, 7], layer=2).states.clone()
    states[2] += 1.0 if is_missed else 0.0
    found = sipit.invert(lm, states, layer=2)
    tolerances = [p.tolerance for p in found.positions] + ([found.miss.tolerance] if found.miss is not None else [])
    assert (found.verdict, len(tolerances)) == ("unmatched" if is_missed else "recovered", 3)
    assert max(tolerances) > 20 * found.tolerance
    assert found.record()["tolerance"] in tolerances
    assert f"tolerance {found.tolerance:.2g}" in found.summary()


def test_sentence_says_that_more_tokens_fit_than_are_named() -> None:
    model = tiny_model("llama")
    rows = embedding_rows(model)
    rows[41:61] = rows[40]
    lm = LanguageModel(model, name="many equal rows")
    found = sipit.invert(lm, lm.capture(input_ids=[40, 7], layer=2))
    assert (found.verdict, len(found.positions[0].rivals)) == ("ambiguous", 16)
    assert "or at least 12 more" in found.summary()


def test_miss_names_the_nearest_token_of_the_vocabulary(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=PLAIN, layer=1)
    states = seen.states.clone()
    states[2] += 0.01 * states[2].norm() / 32**0.5
    found = sipit.invert(llama, states, layer=1, policy="random")
    assert found.miss is not None
    assert found.miss.token_id == int(PLAIN[2])
    assert found.miss.distance == pytest.approx(float((states[2] - seen.states[2]).norm()), rel=1e-3)


@pytest.mark.parametrize("policy", QUICK)
def test_states_of_another_model_are_unmatched(llama: LanguageModel, policy: Policy) -> None:
    other = LanguageModel(tiny_model("llama", seed=9), name="other")
    states = other.capture(input_ids=PLAIN, layer=2).states
    found = sipit.invert(llama, states, layer=2, policy=policy)
    assert (found.verdict, found.input_ids) == ("unmatched", ())


def test_states_of_another_layer_are_unmatched(llama: LanguageModel) -> None:
    states = llama.capture(input_ids=PLAIN, layer=2).states
    assert sipit.invert(llama, states, layer=3, policy="vocabulary").verdict == "unmatched"


def test_states_after_the_final_norm_do_not_pass_for_the_block(llama: LanguageModel) -> None:
    states = llama.capture(input_ids=PLAIN, site="final").states
    assert sipit.invert(llama, states, layer=llama.n_layers, policy="vocabulary").verdict == "unmatched"


def test_fingerprint_of_another_model_is_refused_before_any_search(llama: LanguageModel) -> None:
    other = LanguageModel(tiny_model("llama", seed=9), name="other")
    with pytest.raises(MismatchError, match="'other'"):
        sipit.invert(llama, other.capture(input_ids=PLAIN, layer=2))


@pytest.mark.parametrize("policy", POLICIES)
def test_token_that_fits_only_by_declared_noise_is_ambiguous_not_recovered(
    llama: LanguageModel, policy: Policy
) -> None:
    ids = PLAIN[:4]
    seen = llama.capture(input_ids=ids, layer=2)
    error = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    found = sipit.invert(llama, seen.states + 0.01 * error, layer=2, policy=policy, noise=0.011)
    assert (found.verdict, found.input_ids) == ("ambiguous", tuple(ids.tolist()))
    assert found.noise == 0.011
    assert "noise" in found.summary()


def test_declared_noise_that_is_not_needed_does_not_weaken_the_verdict(llama: LanguageModel) -> None:
    found = sipit.invert(llama, llama.capture(input_ids=PLAIN, layer=2), noise=0.01, policy="vocabulary")
    assert (found.verdict, found.input_ids) == ("recovered", tuple(PLAIN.tolist()))


@pytest.mark.parametrize("exhaustive", [False, True])
def test_two_tokens_within_the_declared_noise_are_never_recovered(llama: LanguageModel, exhaustive: bool) -> None:
    """With noise above every margin any token fits: nothing may be called recovered without a doubt."""
    seen = llama.capture(input_ids=PLAIN[:3], layer=2)
    error = torch.full((3, 32), 0.01)
    found = sipit.invert(llama, seen.states + error, layer=2, policy="vocabulary", noise=1e4, exhaustive=exhaustive)
    assert found.verdict == "ambiguous"


@pytest.mark.parametrize("policy", QUICK)
def test_every_policy_gives_the_same_answer(llama: LanguageModel, policy: Policy) -> None:
    seen = llama.capture(input_ids=PLAIN, layer=3)
    found = sipit.invert(llama, seen, policy=policy, exhaustive=True)
    slow = sipit.invert(llama, seen, policy="vocabulary", exhaustive=True)
    assert found.input_ids == slow.input_ids
    for a, b in zip(found.positions, slow.positions, strict=True):
        assert a.runner_up == pytest.approx(b.runner_up, rel=1e-3)


def _scramble(kind: str, truth: list[int], position: int) -> torch.Tensor:
    others = [i for i in range(VOCAB) if i != truth[position]]
    if kind == "right token last":
        return torch.tensor([*others, truth[position]])
    if kind == "each token many times":
        return torch.tensor(others + others[:20] * 3 + [truth[position]] + others)
    assert kind == "right token left out"
    return torch.tensor(others)


@pytest.mark.parametrize("kind", ["right token last", "each token many times", "right token left out"])
def test_hostile_order_still_gives_the_right_prompt(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    truth = PLAIN.tolist()
    monkeypatch.setattr(vocabulary.VocabularyOrder, "order", lambda self: _scramble(kind, truth, self.view.position))
    found = sipit.invert(llama, llama.capture(input_ids=PLAIN, layer=2), policy="vocabulary")
    assert (found.verdict, found.input_ids) == ("recovered", tuple(truth))


@pytest.mark.parametrize("policy", QUICK)
@pytest.mark.parametrize("max_batch", [1, 5, 64])
def test_no_packed_pass_is_larger_than_max_batch(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, policy: Policy, max_batch: int
) -> None:
    seen = llama.capture(input_ids=PLAIN[:4], layer=2)
    sipit.invert(llama, seen, policy=policy)  # whatever is measured once per model is measured here
    sizes: list[int] = []
    real = PackedRow.run

    def watched(row: PackedRow, token_ids: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        sizes.append(len(token_ids))
        return real(row, token_ids, *rest, **options)

    monkeypatch.setattr(PackedRow, "run", watched)
    found = sipit.invert(llama, seen, policy=policy, max_batch=max_batch)
    assert found.input_ids == tuple(PLAIN[:4].tolist())
    assert 1 <= max(sizes) <= max_batch


def test_progress_grows_to_the_whole_prompt(llama: LanguageModel) -> None:
    steps: list[Progress] = []
    found = sipit.invert(llama, llama.capture(input_ids=PLAIN, layer=2), on_progress=steps.append)
    assert steps[-1].input_ids == found.input_ids
    assert steps[-1].n_checked == found.n_checked
    for earlier, later in pairwise(steps):
        assert later.input_ids[: len(earlier.input_ids)] == earlier.input_ids
        assert (later.n_checked, later.seconds) >= (earlier.n_checked, earlier.seconds)
    assert all(step.seq_len == len(PLAIN) for step in steps)


def test_events_of_a_search_are_its_progress_and_its_result(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=PLAIN, layer=2)
    told: list[Progress] = []
    alone = sipit.invert(llama, seen, max_batch=8, on_progress=told.append)
    *steps, found = search_events(llama, seen, SearchOptions(max_batch=8))
    assert isinstance(found, Inversion)
    assert (found.verdict, found.input_ids, found.positions) == (alone.verdict, alone.input_ids, alone.positions)
    assert [step.input_ids for step in steps if isinstance(step, Progress)] == [step.input_ids for step in told]
    assert len(steps) > 1


def test_random_policy_follows_its_seed(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=PLAIN, layer=1)
    costs = [sipit.invert(llama, seen, policy="random", seed=seed).n_checked for seed in (1, 1, 2)]
    assert costs[0] == costs[1] != costs[2]


def test_inversion_leaves_the_global_random_state_alone(llama: LanguageModel) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for policy in QUICK:
        sipit.invert(llama, llama.capture(input_ids=PLAIN, layer=1), policy=policy)
    assert torch.equal(torch.get_rng_state(), before)


def test_record_has_the_documented_keys(llama: LanguageModel) -> None:
    record = sipit.invert(llama, llama.capture(input_ids=PLAIN, layer=2)).record()
    documented = {
        *("model", "layer", "site", "policy", "verdict", "text", "input_ids", "tolerance", "seconds"),
        *("block_tokens", "prefill_ratio", "wall_ratio", "n_passes", "positions"),
    }
    assert documented <= set(record)
    assert {"token_id", "token", "distance", "runner_up", "n_checked"} <= set(record["positions"][0])


def test_tokens_of_the_evidence_spell_the_text() -> None:
    lm = text_model(bos=True)
    found = sipit.invert(lm, lm.capture("spelt", layer=1))
    assert "".join(p.token or "" for p in found.positions) == found.text == "<s>spelt"


def test_array_tensor_and_file_give_the_same_answer(llama: LanguageModel, tmp_path: Path) -> None:
    seen = llama.capture(input_ids=PLAIN, layer=2)
    path = tmp_path / "seen.safetensors"
    sipit.write_observation(seen, path)
    states = seen.states
    forms: list[tuple[Any, int | None]] = [
        *((states, 2), (states.numpy(), 2), (states.tolist(), 2)),
        *((states.requires_grad_(), 2), (path, None), (str(path), None)),
    ]
    for form, layer in forms:
        assert sipit.invert(llama, form, layer=layer, policy="vocabulary").input_ids == tuple(PLAIN.tolist())
    final = llama.capture(input_ids=PLAIN, site="final").states
    assert sipit.invert(llama, final, site="final", policy="vocabulary").input_ids == tuple(PLAIN.tolist())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"policy": "nonsense"}, OptionError),
        ({"max_batch": 0}, OptionError),
        ({"max_batch": -3}, OptionError),
        ({"noise": -1.0}, OptionError),
        ({"noise": float("nan")}, OptionError),
        ({"noise": float("inf")}, OptionError),
        ({"layer": 99}, OptionError),
        ({"layer": -1}, OptionError),
        ({"layer": None}, OptionError),
        ({"site": "kv", "layer": 4}, OptionError),
        ({"site": "logits"}, OptionError),
        ({"site": "nonsense"}, OptionError),
        ({"site": "final"}, OptionError),
    ],
)
def test_bad_option_is_refused(llama: LanguageModel, options: dict[str, Any], error: type[SipitError]) -> None:
    states = llama.capture(input_ids=PLAIN, layer=2).states
    with pytest.raises(error):
        sipit.invert(llama, states, **{"layer": 2, **options})


@pytest.mark.parametrize(
    ("seen", "error"),
    [
        (torch.zeros(3, 16), ShapeError),
        (torch.zeros(2, 3, 32), ShapeError),
        (torch.zeros(32), ShapeError),
        (torch.zeros(0, 32), ShapeError),
        (torch.zeros(3, 32, dtype=torch.long), ShapeError),
        (torch.full((3, 32), float("nan")), NonFiniteError),
        (torch.full((3, 32), float("inf")), NonFiniteError),
        (torch.full((3, 32), 1e30), NonFiniteError),
        (torch.full((3, 32), 1e300, dtype=torch.float64), NonFiniteError),
        (object(), ShapeError),
        (["a"], ShapeError),
        ("no such file", StorageError),
    ],
)
def test_bad_states_are_refused(llama: LanguageModel, seen: Any, error: type[SipitError]) -> None:
    with pytest.raises(error):
        sipit.invert(llama, seen, layer=2)


@pytest.mark.parametrize(("site", "layer"), [("kv", 4), ("logits", 2), ("final_unit", 3)])
def test_layer_without_the_site_is_refused(llama: LanguageModel, site: Any, layer: int) -> None:
    with pytest.raises(OptionError, match=site):
        sipit.invert(llama, Observation(states=torch.zeros(3, 32), layer=layer, site=site))


def test_layer_that_contradicts_the_observation_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(OptionError, match="after 2 blocks"):
        sipit.invert(llama, llama.capture(input_ids=PLAIN, layer=2), layer=3)


def test_site_that_contradicts_the_observation_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(OptionError, match="site"):
        sipit.invert(llama, llama.capture(input_ids=PLAIN, layer=2), site="final")


def test_observation_is_not_changed_by_inverting_it(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=PLAIN, layer=2, dtype="bfloat16")
    before = seen.digest()
    sipit.invert(llama, seen)
    assert seen.digest() == before


def test_zero_states_are_unmatched_not_a_crash(llama: LanguageModel) -> None:
    found = sipit.invert(llama, torch.zeros(3, 32), layer=2, policy="vocabulary")
    assert found.verdict == "unmatched"


@pytest.mark.parametrize("policy", POLICIES)
def test_single_token_prompt_is_recovered(llama: LanguageModel, policy: Policy) -> None:
    found = sipit.invert(llama, llama.capture(input_ids=[77], layer=2), policy=policy)
    assert (found.verdict, found.input_ids) == ("recovered", (77,))
