"""A state that amplifies rounding beyond the noise floor is judged by its own noise, never by a wider guess."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sipit
from sipit import LanguageModel
from sipit.inversion import Progress, check_certificate
from sipit.inversion.evidence.certificate import certificate_of
from sipit.inversion.judging import check as check_module
from sipit.inversion.judging import noise as noise_module
from sipit.inversion.judging import tolerance
from sipit.inversion.judging.check import Checked
from sipit.inversion.proposals import SearchView
from sipit.inversion.proposals.proposal import Draft
from sipit.inversion.search import batching as search_module
from sipit.models import PackedRow, TruncatedModel
from sipit.observations import Cut
from tests.tiny_models import VOCAB, random_ids, tiny_model

IDS = random_ids(24, seed=3)
LAYER = 3


@pytest.fixture
def lm() -> LanguageModel:
    return LanguageModel(tiny_model("llama"), name="llama")


@pytest.fixture
def low_floor(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that calibration saw far less noise than there is."""
    floor = noise_module.NoiseFloor(first=2e-9, rest=2e-9, first_gap=1.0, rest_gap=1.0, block_tokens=0)
    monkeypatch.setitem(lm._derived, ("noise floor", Cut(LAYER), 0), floor)


@pytest.mark.thorough
@pytest.mark.usefixtures("low_floor")
def test_right_token_above_the_noise_floor_is_accepted_by_its_own_noise(lm: LanguageModel) -> None:
    seen = lm.capture(input_ids=IDS, layer=LAYER)
    found = sipit.invert(lm, seen, max_batch=16)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    raised = [p for p in found.positions if p.tolerance > 1e-6]
    assert raised  # else this test shows nothing
    assert all(p.distance <= p.tolerance for p in found.positions)
    assert check_certificate(certificate_of(found), seen, lm).holds


@pytest.mark.usefixtures("low_floor")
def test_without_its_own_noise_it_would_be_refused(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "local_noise", lambda *_, **__: (0.0, 0))
    assert sipit.invert(lm, lm.capture(input_ids=IDS, layer=LAYER)).verdict == "unmatched"


@pytest.mark.thorough
@pytest.mark.usefixtures("low_floor")
def test_wrong_states_stay_unmatched_and_a_wrong_claim_does_not_hold(lm: LanguageModel) -> None:
    seen = lm.capture(input_ids=IDS, layer=LAYER)
    states = seen.states.clone()
    states[5] += 0.01 * torch.randn(states.shape[1], generator=torch.Generator().manual_seed(0))
    found = sipit.invert(lm, states, layer=LAYER)
    assert (found.verdict, len(found.input_ids)) == ("unmatched", 5)
    right = certificate_of(sipit.invert(lm, seen))
    swapped = {**right, "input_ids": [*right["input_ids"][:-1], (right["input_ids"][-1] + 1) % lm.vocab_size]}
    assert not check_certificate(swapped, seen, lm).holds


@pytest.mark.usefixtures("low_floor")
def test_token_that_its_own_noise_does_not_explain_is_looked_at_once(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "local_noise", lambda *_, **__: (0.0, 0))  # explains nothing
    states = lm.capture(input_ids=IDS, layer=LAYER, dtype="bfloat16").states.clone()
    limit = tolerance.half_ulp(states[4]).norm()
    states[4, states[4].abs().argmin()] += 0.5 * limit  # within the plain distance, outside the box of rounded values
    passes = 0

    def bounded(_: Progress) -> None:
        nonlocal passes
        passes += 1
        assert passes < 4 * VOCAB

    found = sipit.invert(lm, states, layer=LAYER, policy="vocabulary", on_progress=bounded)
    assert (found.verdict, len(found.input_ids)) == ("unmatched", 4)
    assert found.miss is not None
    assert found.miss.distance < limit


def test_local_noise_looks_at_every_shape_and_no_observation(lm: LanguageModel) -> None:
    cut = lm.cut(Cut(LAYER))
    prefix = IDS[:6]
    noise, spent = noise_module.local_noise(cut, prefix, 9, seq_len=20, row=cut.row(prefix))
    scale = float(cut.ordinary(torch.cat([prefix, torch.tensor([9])]))[-1].norm())
    assert 0 <= noise < 1e-4 * scale
    assert spent == 20 + sum(noise_module._WIDTHS)
    again, with_prefix = noise_module.local_noise(cut, prefix, 9, seq_len=20)
    assert (again, with_prefix) == (noise, spent + 6)


class _WithDecoys:
    """A proposal that knows the prompt, and offers a wrong token beside the right one at every position ahead."""

    batch_limit = None

    def __init__(self, view: SearchView) -> None:
        self.view = view

    def begin(self) -> None: ...

    def next(self, n: int, untried: Tensor) -> Tensor:
        pair = self._pair(self.view.position)
        return pair[untried[pair]] if bool(untried[pair].any()) else untried.nonzero()[:n, 0]

    def draft(self) -> Draft:
        later = range(self.view.position + 1, len(IDS))
        return Draft(here=[0.999], ahead=((self._pair(p).tolist(), [0.999, 0.999]) for p in later))

    def learn(self, checked: Checked) -> None: ...

    def overhear(self, position: int, checked: Checked) -> None: ...

    def settle(self, token_id: int) -> None: ...

    def _pair(self, position: int) -> Tensor:
        return torch.stack([IDS[position], (IDS[position] + 1) % 150])


@pytest.mark.usefixtures("low_floor")
def test_noise_of_a_state_behind_tokens_accepted_in_the_same_pass_is_measured_behind_them(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind: list[tuple[int, int]] = []
    measure = noise_module.local_noise

    def watched(
        cut: TruncatedModel, prefix: Tensor, token_id: int, *, seq_len: int, row: PackedRow, lane: int
    ) -> tuple[float, int]:
        behind.append((row.length, len(prefix)))
        return measure(cut, prefix, token_id, seq_len=seq_len, row=row, lane=lane)

    monkeypatch.setattr(check_module, "local_noise", watched)
    monkeypatch.setattr(search_module, "pass_price", lambda *_: 2.0)  # as for a long prompt: wide levels
    monkeypatch.setattr(search_module, "proposal_for", lambda _, view, **__: _WithDecoys(view))
    found = sipit.invert(lm, lm.capture(input_ids=IDS, layer=LAYER))
    assert found.input_ids == tuple(IDS.tolist())
    assert any(n_prefix for _, n_prefix in behind)
    assert all(n_cached == n_prefix for n_cached, n_prefix in behind)
    assert max(p.tolerance for p in found.positions) < 1e-3
