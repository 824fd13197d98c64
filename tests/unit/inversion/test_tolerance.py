"""The tolerance is a true bound on what arithmetic does, and no looser than it must be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sipit
from sipit import LanguageModel, Observation
from sipit.inversion import Policy
from sipit.inversion.judging import noise as noise_module
from sipit.inversion.judging.noise import SAFETY, NoiseFloor, noise_floor
from sipit.inversion.judging.tolerance import half_ulp, tolerance_for
from sipit.models import PackedRow
from sipit.observations import Cut, Site
from tests.tiny_models import N_LAYERS, VOCAB, random_ids, tiny_model, true_states

IDS = random_ids(7, seed=6)
CODES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def _value(code: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the number whose bits are `code`."""
    return torch.tensor([code], dtype=CODES[dtype]).view(dtype)


def _n_finite(dtype: torch.dtype) -> int:
    return int(torch.tensor([torch.finfo(dtype).max], dtype=dtype).view(CODES[dtype]))


@pytest.mark.parametrize("dtype", list(CODES))
@given(data=st.data())
def test_half_ulp_is_half_the_step_to_the_next_number(dtype: torch.dtype, data: st.DataObject) -> None:
    code = data.draw(st.integers(0, _n_finite(dtype) - 1))
    value, above = _value(code, dtype), _value(code + 1, dtype)
    step = float(above.double() - value.double())
    assert float(half_ulp(value).double()) == step / 2
    assert float(half_ulp(-value).double()) == step / 2


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_half_ulp_of_the_smallest_subnormals_is_exact(dtype: torch.dtype, code: int) -> None:
    value, above = _value(code, dtype), _value(code + 1, dtype)
    assert float(half_ulp(value).double()) == float(above.double() - value.double()) / 2


@pytest.mark.parametrize("dtype", list(CODES))
@given(data=st.data())
def test_half_ulp_bounds_every_rounding(dtype: torch.dtype, data: st.DataObject) -> None:
    largest = torch.finfo(dtype).max
    exact = data.draw(st.floats(-largest, largest, allow_nan=False) | st.floats(-100, 100) | st.floats(-1e-37, 1e-37))
    wide = torch.tensor([exact], dtype=torch.float64)
    stored = wide.to(dtype)
    assert float((wide - stored.double()).abs()) <= float(half_ulp(stored).double())


@pytest.mark.parametrize("exponent", [-14, -3, 0, 1, 9])
def test_half_ulp_at_a_power_of_two_covers_both_sides(exponent: int) -> None:
    power = 2.0**exponent
    stored = torch.tensor([power], dtype=torch.float16)
    below = torch.nextafter(stored, torch.zeros_like(stored)).double()
    midpoint = (stored.double() + below) / 2
    assert float(half_ulp(stored).double()) >= float((stored.double() - midpoint).abs())
    assert float(half_ulp(stored).double()) == power * 2.0**-11


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_excess_is_zero_for_exact_states_and_their_rounding(llama: LanguageModel, dtype: str) -> None:
    states = true_states(llama.model, "llama", IDS)[(3, "block")]
    seen = llama.capture(input_ids=IDS, layer=3, dtype=dtype)
    tolerance = tolerance_for(llama, seen)
    rows = torch.arange(len(IDS))
    assert float(tolerance.excess(states, seen.states.float(), rows).max()) == 0
    assert bool(((states - seen.states.float()).double().norm(dim=1) <= tolerance.total).all())


def test_excess_grows_with_what_rounding_does_not_explain(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=IDS, layer=3, dtype="bfloat16")
    tolerance = tolerance_for(llama, seen)
    observed = seen.states.float()
    assert tolerance.half_step is not None
    moved = observed + tolerance.half_step.float()
    moved[:, 0] += 0.5
    got = tolerance.excess(moved, observed, torch.arange(len(IDS)))
    torch.testing.assert_close(got, torch.full_like(got, 0.5), rtol=1e-4, atol=1e-5)


def test_excess_without_rounding_is_the_distance(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=IDS, layer=2)
    tolerance = tolerance_for(llama, seen)
    assert tolerance.half_step is None
    moved = seen.states.clone()
    moved[:, 3] += 3
    moved[:, 4] -= 4
    assert tolerance.excess(moved, seen.states, torch.arange(len(IDS))).tolist() == pytest.approx([5.0] * len(IDS))


def test_noise_floor_is_positive_and_far_below_the_gap(family_lm: LanguageModel) -> None:
    for layer in (0, 2, N_LAYERS):
        floor = noise_floor(family_lm, Cut(layer, "block"))
        assert 0 < floor.first < floor.first_gap
        assert 0 < floor.rest < floor.rest_gap
        assert math.isfinite(floor.rest_gap)


def test_first_position_has_a_noise_floor_of_its_own(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    floor = NoiseFloor(first=1e-3, rest=1e-6, first_gap=1.0, rest_gap=1.0, block_tokens=0)
    monkeypatch.setitem(llama._derived, ("noise floor", Cut(2), 0), floor)
    seen = llama.capture(input_ids=IDS, layer=2)
    norms = seen.states.double().norm(dim=1)
    expected = SAFETY * norms * torch.tensor([1e-3] + [1e-6] * (len(IDS) - 1), dtype=torch.float64)
    torch.testing.assert_close(tolerance_for(llama, seen).total, expected)


def test_noise_floor_is_measured_once(llama: LanguageModel) -> None:
    assert noise_floor(llama, Cut(2, "block")) is noise_floor(llama, Cut(2, "block"))


@pytest.mark.parametrize("layer", [0, 2, N_LAYERS])
def test_tolerance_covers_the_true_noise_on_fresh_prompts(family_lm: LanguageModel, layer: int) -> None:
    cut = family_lm.cut(Cut(layer))
    for seed in range(4):
        ids = random_ids(40, seed=100 + seed)
        seen = Observation(states=true_states(family_lm.model, family_lm.name, ids)[(layer, "block")], layer=layer)
        total = tolerance_for(family_lm, seen).total
        row = cut.row()
        for start in range(0, 40, 5):
            places = torch.arange(start, start + 5)
            states = row.run(ids[places], places, torch.ones(5, 5, dtype=torch.bool).tril())
            row.keep(range(5))
            distances = (states - seen.states[places]).double().norm(dim=1)
            assert bool((distances <= total[places]).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("layer", "site"), [(0, "block"), (2, "block"), (N_LAYERS, "final")])
def test_rounded_observations_are_recovered_by_a_float32_model(
    family_lm: LanguageModel, dtype: str, layer: int, site: Site
) -> None:
    seen = family_lm.capture(input_ids=IDS, layer=layer, site=site, dtype=dtype)
    found = sipit.invert(family_lm, seen, policy="vocabulary")
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert found.observation_dtype == dtype


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize("policy", ["likely", "vocabulary"])
def test_bfloat16_model_recovers_its_own_states(family: str, policy: Policy) -> None:
    model = tiny_model(family).bfloat16()
    lm = LanguageModel(model, name=family)
    states = true_states(model, family, IDS)[(2, "block")]
    assert states.dtype == torch.bfloat16
    found = sipit.invert(lm, states, layer=2, policy=policy)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert found.model_dtype == "bfloat16"


@pytest.mark.parametrize("policy", ["likely", "vocabulary"])
def test_float64_model_recovers_with_a_float64_tolerance(policy: Policy) -> None:
    lm = LanguageModel(tiny_model("gpt2").double(), name="gpt2")
    seen = lm.capture(input_ids=IDS, layer=3)
    assert seen.dtype == "float64"
    found = sipit.invert(lm, seen, policy=policy)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert found.tolerance < 1e-10


def test_float32_states_of_a_float64_model_widen_the_tolerance_by_their_rounding() -> None:
    lm = LanguageModel(tiny_model("gpt2").double(), name="gpt2")
    seen = lm.capture(input_ids=IDS, layer=3, dtype="float32")
    found = sipit.invert(lm, seen, policy="vocabulary")
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert all(0 < p.distance <= p.tolerance for p in found.positions)


def test_float64_observation_of_a_float32_model_is_recovered(llama: LanguageModel) -> None:
    found = sipit.invert(llama, llama.capture(input_ids=IDS, layer=3, dtype="float64"), policy="vocabulary")
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))


def test_packed_pass_that_computes_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LanguageModel(tiny_model("llama"), name="llama")
    seen = lm.capture(input_ids=IDS, layer=2)
    real = PackedRow.run
    monkeypatch.setattr(PackedRow, "run", lambda *a, **k: real(*a, **k).flip(-1))  # unseeded noise fell short at times
    with pytest.raises(sipit.SipitError, match="packed check does not"):
        sipit.invert(lm, seen, policy="vocabulary")


def test_largest_vocabulary_id_is_within_reach_of_calibration() -> None:
    """A calibration prompt never names a token the model lacks, however small the vocabulary."""
    lm = LanguageModel(tiny_model("llama", vocab_size=20), name="llama")
    found = sipit.invert(lm, lm.capture(input_ids=[19, 0, 19, 7], layer=2))
    assert found.input_ids == (19, 0, 19, 7)
    assert lm.vocab_size < VOCAB


def test_noise_ceiling_is_above_what_each_dtype_shows_and_below_what_it_does_not_explain() -> None:
    for dtype, seen in ((torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float64, 1e-13)):
        assert 1.4 * seen < noise_module.noise_ceiling(torch.finfo(dtype).eps) < 0.1


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize(("most", "closes"), [(1, False), (3, False), (15, True)])
def test_a_box_said_to_hold_no_other_tokens_state_holds_none(
    llama: LanguageModel, layer: int, most: int, closes: bool
) -> None:
    """Four groups of values, each rounded four times as coarsely as the one before: checked against the vocabulary."""
    n_closed = 0
    for seed in range(4):
        ids = random_ids(6, seed=40 + seed)
        seen = llama.capture(input_ids=ids, layer=layer)
        groups = seen.states.unflatten(1, (4, -1))
        step = groups.abs().amax(dim=2, keepdim=True) / most * torch.tensor([1, 4, 16, 64]).roll(seed)[:, None]
        values, half = ((groups / step).round() * step).flatten(1), (step / 2).expand_as(groups).flatten(1)
        tolerance = tolerance_for(llama, replace(seen, states=values, half_step=half))
        for position in range(1, len(ids)):
            rows = torch.full((VOCAB,), position)
            states = llama.cut(seen.cut).row(ids[:position]).run(torch.arange(VOCAB), rows)
            excess = tolerance.excess(states, values[position].expand_as(states), rows)
            fits = (excess <= tolerance.noise[position]).nonzero()[:, 0].tolist()
            if not tolerance.is_open[position]:
                n_closed += 1
                assert fits == [int(ids[position])]
    assert (n_closed == 20) == closes
