"""Decoding behind noise: what is found, what it is called, and what must never be called probable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel, Observation, invert
from sipit.errors import CertificateError, OptionError, ShapeError
from sipit.inversion import NoiseModel, certificate_of, check_certificate
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import noise_model
from sipit.inversion.noise.beam_search import BeamSearch
from sipit.inversion.noise.posterior import Candidates, TokenPosteriors, Unrun
from sipit.inversion.noise.prefixes import BeamPrefixes
from sipit.models import in_pass
from sipit.observations import Cut
from tests.tiny_models import random_ids, text_model

IDS = random_ids(12, seed=3, vocab_size=256)
LAYER = 2


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model()


def _noisy(lm: LanguageModel, sigma: float, *, layer: int = LAYER, seed: int = 0) -> Observation:
    seen = lm.capture(input_ids=IDS, layer=layer)
    noise = torch.randn(seen.states.shape, generator=torch.Generator().manual_seed(seed))
    return replace(seen, states=seen.states + sigma * noise)


def test_noise_is_estimated_and_the_prompt_probable(lm: LanguageModel) -> None:
    found = invert(lm, _noisy(lm, 0.05), noise="auto")
    assert found.verdict == "probable"
    assert found.input_ids == tuple(IDS.tolist())
    assert found.noise_model is not None
    assert found.noise_model["is_estimated"]
    assert found.noise_model["sigma"] == pytest.approx(0.05, rel=0.2)
    assert found.posterior is not None
    assert found.posterior >= 0.95
    assert all(p.posterior is not None and p.posterior >= found.posterior - 1e-9 for p in found.positions)


def test_states_without_noise_are_recovered(lm: LanguageModel) -> None:
    found = invert(lm, _noisy(lm, 0.0), noise="auto")
    assert found.verdict == "recovered"
    assert found.input_ids == tuple(IDS.tolist())
    assert found.noise_model is None


def test_declared_model_is_used_as_it_is(lm: LanguageModel) -> None:
    found = invert(lm, _noisy(lm, 0.05), noise=NoiseModel.gaussian(0.05))
    assert found.noise_model is not None
    assert not found.noise_model["is_estimated"]
    assert found.noise_model["sigma"] == pytest.approx(0.05)
    assert found.input_ids == tuple(IDS.tolist())


@pytest.mark.parametrize("kind", ["another layer", "white", "spliced", "rows reversed"])
def test_wrong_states_are_neither_recovered_nor_probable(lm: LanguageModel, kind: str) -> None:
    seen = _noisy(lm, 0.05)
    other = lm.capture(input_ids=random_ids(12, seed=9, vocab_size=256), layer=LAYER).states
    rows: dict[str, Tensor] = {
        "another layer": lm.capture(input_ids=IDS, layer=LAYER + 1).states,
        "white": float(seen.states.std()) * torch.randn(seen.states.shape, generator=torch.Generator().manual_seed(1)),
        "spliced": torch.cat([seen.states[:6], other[6:]]),
        "rows reversed": seen.states.flip(0),
    }
    found = invert(lm, replace(seen, states=rows[kind]), noise="auto")
    assert found.verdict in ("ambiguous", "unmatched")


def test_rows_that_another_arithmetic_moved_are_told_from_those_of_another_layer(lm: LanguageModel) -> None:
    moved = in_pass(lm, "autocast-bfloat16").capture(input_ids=IDS, layer=LAYER)
    elsewhere = replace(lm.capture(input_ids=IDS, layer=LAYER - 1), layer=LAYER)
    found = [invert(lm, replace(seen, fingerprint=None), noise="auto") for seen in (moved, elsewhere)]
    assert [one.verdict for one in found] == ["unmatched", "unmatched"]
    hints = ["--pass-dtype" in one.miss.diagnosis for one in found if one.miss is not None]
    assert hints == [True, False]


def test_certificate_of_a_probable_prompt_holds_and_is_no_proof(lm: LanguageModel) -> None:
    seen = _noisy(lm, 0.05)
    found = invert(lm, seen, noise="auto")
    outcome = check_certificate(certificate_of(found), seen, lm)
    assert outcome.holds
    assert not outcome.is_proof


def test_certificate_with_another_token_does_not_hold(lm: LanguageModel) -> None:
    seen = _noisy(lm, 0.05)
    found = invert(lm, seen, noise="auto")
    ids = list(found.input_ids)
    ids[5] = (ids[5] + 1) % 256
    positions = tuple(replace(p, token_id=i) for p, i in zip(found.positions, ids, strict=True))
    forged = replace(found, input_ids=tuple(ids), text=lm.decode(ids), positions=positions)
    outcome = check_certificate(certificate_of(forged), seen, lm)
    assert not outcome.holds
    assert any("standard deviations" in reason for reason in outcome.reasons)


def test_probable_needs_a_noise_model_in_the_record(lm: LanguageModel) -> None:
    seen = _noisy(lm, 0.05)
    found = replace(invert(lm, seen, noise="auto"), noise_model=None)
    with pytest.raises(CertificateError, match="noise_model"):
        check_certificate(certificate_of(found), seen, lm)


def test_beams_that_share_tokens_compute_as_ordinary_passes(lm: LanguageModel) -> None:
    model = lm.cut(Cut(LAYER))
    prefixes = BeamPrefixes(model, torch.empty(0, dtype=torch.long), max_batch=2)
    prefixes.grow(torch.tensor([5, 9]), torch.tensor([0, 0]))
    prefixes.grow(torch.tensor([7, 7, 8]), torch.tensor([0, 1, 1]))  # 5 7, 9 7, 9 8
    prefixes.grow(torch.tensor([3, 4]), torch.tensor([2, 0]))  # 9 8 3, 5 7 4
    got = prefixes.states(torch.tensor([11, 12, 13]), torch.tensor([0, 1, 0]))
    for states, ids in zip(got, ([9, 8, 3, 11], [5, 7, 4, 12], [9, 8, 3, 13]), strict=True):
        assert torch.allclose(states, model.ordinary(torch.tensor(ids))[-1], atol=1e-4)


def test_posteriors_of_a_short_prompt_are_those_of_all_prompts(lm: LanguageModel) -> None:
    ids = torch.tensor([70, 80])
    seen = lm.capture(input_ids=ids, layer=LAYER)
    sigma = 1.0
    noise = torch.randn(seen.states.shape, generator=torch.Generator().manual_seed(2))
    seen = replace(seen, states=seen.states + sigma * noise)
    beams = BeamSearch(lm, seen, NoiseModel.gaussian(sigma), Meter()).run()
    expected = _all_pairs(lm, seen, sigma)  # (V, V)
    assert float(beams.posteriors[0]) == pytest.approx(float(expected.max()), abs=0.02)
    assert torch.allclose(beams.token_posteriors[0], expected.sum(dim=1), atol=0.02)
    assert torch.allclose(beams.token_posteriors[1], expected.sum(dim=0), atol=0.02)


def _all_pairs(lm: LanguageModel, seen: Observation, sigma: float) -> Tensor:
    """Return the posterior of every prompt of two tokens by brute force. (V, V)."""
    from sipit.inversion.noise.prior import TokenPrior

    every = torch.arange(lm.vocab_size)
    pairs = torch.stack(torch.meshgrid(every, every, indexing="ij"), dim=-1).flatten(0, 1)
    states = torch.cat([lm.cut(seen.cut).ordinary_batch(part) for part in pairs.split(4096)]).double()  # (V², 2, D)
    logs = -0.5 * ((states - seen.states.double()) / sigma).square().sum(dim=(1, 2))
    prior = TokenPrior(lm, torch.empty(0, dtype=torch.long), Meter(), max_batch=64, seq_len=2)
    first = prior.probabilities[0].double().log()
    prior.grow(every, torch.zeros_like(every))
    joint = logs.view(lm.vocab_size, -1) + first[:, None] + prior.probabilities.double().log()
    return (joint - joint.flatten().logsumexp(dim=0)).exp()


def test_mass_left_out_stays_with_its_tokens() -> None:
    kept_out = TokenPosteriors(1, 4)
    found = Candidates(
        token_ids=torch.tensor([0, 1]),
        beams=torch.tensor([0, 0]),
        log_scores=torch.tensor([0.6, 0.3], dtype=torch.float64).log(),
        unrun=Unrun(
            token_ids=torch.tensor([0, 2]),
            log_scores=torch.tensor([[0.0, 0.025]], dtype=torch.float64).log(),
            log_elsewhere=torch.tensor([0.0, 0.0, 0.0, 0.075], dtype=torch.float64).log(),
            beam_shares=torch.ones(1, dtype=torch.float64),
        ),
    )
    kept_out.leave_out(0, torch.zeros(1, 0, dtype=torch.long), found, torch.tensor([0]))
    assert kept_out.left == pytest.approx(0.6)
    got = kept_out.ended(torch.tensor([[0]]), torch.tensor([0.6], dtype=torch.float64), [torch.zeros(4)])
    assert got[0].tolist() == pytest.approx([0.6, 0.3, 0.025, 0.075])


def test_paths_left_out_before_a_position_count_half_as_those_that_reached_it_and_half_as_its_row_alone() -> None:
    kept_out = TokenPosteriors(2, 3)
    nothing = torch.full((3,), -torch.inf, dtype=torch.float64)
    alone = torch.ones(1, dtype=torch.float64)
    unrun = Unrun(token_ids=torch.arange(3), log_scores=nothing[None], log_elsewhere=nothing, beam_shares=alone)

    def found(ids: list[int], shares: list[float]) -> Candidates:
        logs = torch.tensor(shares, dtype=torch.float64).log()
        beams = torch.zeros(len(ids), dtype=torch.long)
        return Candidates(token_ids=torch.tensor(ids), beams=beams, log_scores=logs, unrun=unrun)

    kept_out.leave_out(0, torch.zeros(1, 0, dtype=torch.long), found([0, 1], [0.8, 0.2]), torch.tensor([0]))
    kept_out.leave_out(1, torch.tensor([[0]]), found([1, 2], [0.75, 0.25]), torch.tensor([0]))
    alone = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    tokens, shares = torch.tensor([[0, 1]]), torch.tensor([0.6], dtype=torch.float64)
    got = kept_out.ended(tokens, shares, [alone, alone])
    assert got[0].tolist() == pytest.approx([0.8, 0.2, 0.0])
    assert got[1].tolist() == pytest.approx([0.05, 0.6 + 0.05 + 0.075, 0.2 + 0.025])


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_densities_sum_to_one(law: str) -> None:
    model = NoiseModel(law=law, spread=torch.tensor([0.7], dtype=torch.float64))  # type: ignore[arg-type]
    grid = torch.linspace(-8, 8, 100_001, dtype=torch.float64)[:, None]
    density = model.log_likelihood(torch.zeros_like(grid), grid).exp()
    assert float(density.sum() * 16 / 100_000) == pytest.approx(1.0, abs=1e-3)


def test_refitted_finds_scale_shift_and_size() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    shift = torch.linspace(-2, 2, 64, dtype=torch.float64)
    observed = 1.5 * states + shift + 0.1 * torch.randn(40, 64, generator=generator, dtype=torch.float64)
    start = NoiseModel(spread=torch.tensor([1.0]), scale=1.1, shift=torch.zeros(64))
    found = start.refitted(observed, states)
    assert found.scale == pytest.approx(1.5, abs=0.01)
    assert found.shift is not None
    assert torch.allclose(found.shift, shift, atol=0.1)
    assert found.sigma == pytest.approx(0.1, rel=0.1)


def test_dropped_coordinates_say_nothing() -> None:
    model = replace(NoiseModel.gaussian(1.0), drops=True)
    observed, states = torch.tensor([[0.0, 2.0]]), torch.tensor([[9.0, 2.0]])
    assert float(model.log_likelihood(observed, states)[0]) == pytest.approx(-0.9189, abs=1e-3)


def test_parameters_make_the_same_model() -> None:
    model = NoiseModel(spread=torch.tensor([0.5, 0.25]), scale=2.0, shift=torch.tensor([1.0, 0.0]), longest=3.0)
    again = noise_model(model.parameters())
    assert again.parameters() == model.parameters()
    with pytest.raises(OptionError, match="cannot be read"):
        noise_model({"law": "gaussian"})


@pytest.mark.parametrize(
    "changes",
    [
        *({"shift": [float("nan")] * 8}, {"shift": [float("inf")] * 8}, {"shift": [[1.0] * 8]}, {"longest": 0.0}),
        *({"longest": float("nan")}, {"longest": -1.0}, {"scale": 10**400}, {"law": 10**400}, {"spread": [0.0]}),
        *({"scale": True}, {"scale": "1.5"}, {"drops": "x"}),
    ],
)
def test_record_of_a_noise_model_with_no_number_is_refused_shortly(changes: dict[str, Any]) -> None:
    """A comparison with what is no number is false, so no residual would look wrong."""
    with pytest.raises(OptionError) as raised:
        noise_model({**NoiseModel.gaussian(0.1).parameters(), **changes})
    assert len(str(raised.value)) < 300


def test_noise_of_another_width_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ShapeError, match="3 wide"):
        invert(lm, _noisy(lm, 0.0), noise=NoiseModel.gaussian(torch.ones(3)))


def test_rows_as_wide_as_a_large_vocabulary_are_refused_before_they_fill_memory(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sipit.inversion.noise.decode._MOST_BYTES", 4 * lm.vocab_size**2 - 1)
    seen = lm.capture(input_ids=IDS, site="logits")
    with pytest.raises(OptionError, match=r"logits.*leave the noise out"):
        invert(lm, seen, noise="auto")


@pytest.mark.parametrize("spread", [0.0, -1.0, float("nan")])
def test_noise_without_a_size_is_refused(spread: float) -> None:
    with pytest.raises(OptionError, match="above 0"):
        NoiseModel.gaussian(spread)
