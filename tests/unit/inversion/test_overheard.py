"""What tokens checked behind a wrong one tell about the positions ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import sipit
from sipit import LanguageModel
from sipit.inversion.judging.check import Checked, PackedCheck
from sipit.inversion.proposals.fused import FusedProposal, _informed
from sipit.inversion.proposals.off_path import OffPathEvidence
from tests.tiny_models import random_ids, tiny_model


def _outcome(token_ids: Sequence[int], distances: Sequence[float]) -> Checked:
    no = torch.zeros(len(token_ids), dtype=torch.bool)
    nothing = torch.zeros(len(token_ids), 8)
    return Checked(
        token_ids=torch.tensor(token_ids), states=nothing, distances=torch.tensor(distances), fits=no, is_near=no
    )


@pytest.fixture
def observed() -> Tensor:
    return torch.randn(400, 8, generator=torch.Generator().manual_seed(0))


def test_near_tokens_are_spoken_for_and_far_ones_against(observed: Tensor) -> None:
    heard = OffPathEvidence(observed)
    heard.note(3, _outcome([7, 8, 9], [0.05, 3.0, 6.0]))
    nats = heard.evidence(3)
    assert nats[7] > 1 > -0.1 > nats[9]
    assert nats[7] > nats[8] >= nats[9]
    assert heard.evidence(4) == {}


def test_what_a_distance_means_is_learned_from_settled_positions(observed: Tensor) -> None:
    heard = OffPathEvidence(observed)
    scale = float((observed[399] - observed[1:].mean(dim=0)).norm())
    for position in range(1, 300):  # here right tokens come as near as 0.6 of the scale, wrong ones to 2.0
        own = float((observed[position] - observed[1:].mean(dim=0)).norm())
        heard.note(position, _outcome([1, 2], [0.6 * own, 2.0 * own]))
        heard.settle(position, 1)
    heard.note(399, _outcome([1, 2, 3], [0.6 * scale, 2.0 * scale, 0.9 * scale]))
    nats = heard.evidence(399)
    assert nats[1] > 3
    assert nats[2] < -3
    assert nats[2] <= nats[3] <= nats[1]
    assert max(map(abs, nats.values())) <= 7  # however sure the two kinds of distance are told apart


def test_of_tokens_behind_one_path_the_nearest_is_believed_however_far_all_are(observed: Tensor) -> None:
    heard = OffPathEvidence(observed)
    scale = float((observed[3] - observed[1:].mean(dim=0)).norm())
    heard.note(3, _outcome([7, 8], [0.6 * scale, 0.7 * scale]))  # another path, whose tokens are compared by themselves
    heard.note(3, _outcome([4, 5, 6], [0.50 * scale, 0.55 * scale, 0.80 * scale]))
    nats = heard.evidence(3)
    assert nats[4] > nats[5] + 1 > nats[6] + 4
    assert nats[7] > nats[8] + 2
    alone = OffPathEvidence(observed)
    alone.note(3, _outcome([5], [0.55 * scale]))
    assert alone.evidence(3)[5] > nats[5] + 1  # the same distance, with nothing nearer beside it


def test_settled_positions_are_forgotten_and_the_last_word_counts(observed: Tensor) -> None:
    heard = OffPathEvidence(observed)
    heard.note(3, _outcome([7], [6.0]))
    heard.note(3, _outcome([7], [0.05]))
    assert heard.evidence(3)[7] > 1
    heard.settle(3, 7)
    assert heard.evidence(3) == {}


def test_states_that_overflowed_poison_nothing(observed: Tensor) -> None:
    heard = OffPathEvidence(observed)
    heard.note(3, _outcome([7, 8, 9], [float("nan"), float("inf"), 0.0]))
    assert heard.evidence(3)[7] == heard.evidence(3)[8] < 0 < heard.evidence(3)[9]
    heard.settle(3, 7)
    heard.note(4, _outcome([7], [0.5]))
    assert abs(heard.evidence(4)[7]) <= 7


def test_evidence_reorders_guesses_and_leaves_the_others_their_share() -> None:
    token_ids, chances = [4, 5, 6], [0.6, 0.3, 0.05]
    ordered, informed = _informed(token_ids, chances, {5: 3.0, 4: -1.0})
    assert ordered == [5, 4, 6]
    weights = torch.tensor(chances) * torch.tensor([-1.0, 3.0, 0.0]).exp()
    torch.testing.assert_close(torch.tensor(informed), (weights / (weights.sum() + 0.05))[[1, 0, 2]])
    assert _informed(token_ids, chances, {}) == (token_ids, chances)


def test_readers_hear_what_was_checked_ahead_at_its_own_position(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LanguageModel(tiny_model("llama", seed=3), name="ahead")
    ids = random_ids(24, seed=5)
    monkeypatch.setattr("sipit.inversion.search.batching.pass_price", lambda *_: 16.0)  # few ahead in one pass
    judged: Counter[tuple[int, int]] = Counter()
    heard: list[tuple[int, int, int]] = []  # positions accepted then, position, token
    learned: Counter[tuple[int, int]] = Counter()
    judge, overhear, learn = PackedCheck.judge, FusedProposal.overhear, FusedProposal.learn

    def spied_judge(self: PackedCheck, token_ids: Tensor, positions: Tensor, states: Tensor) -> Checked:
        judged.update(zip(positions.tolist(), token_ids.tolist(), strict=True))
        return judge(self, token_ids, positions, states)

    def spied_overhear(self: FusedProposal, position: int, checked: Checked) -> None:
        heard.extend((self.view.position, position, token) for token in checked.token_ids.tolist())
        overhear(self, position, checked)

    def spied_learn(self: FusedProposal, checked: Checked) -> None:
        learned.update((self.view.position, token) for token in checked.token_ids.tolist())
        learn(self, checked)

    monkeypatch.setattr(PackedCheck, "judge", spied_judge)
    monkeypatch.setattr(FusedProposal, "learn", spied_learn)
    monkeypatch.setattr(FusedProposal, "overhear", spied_overhear)
    found = sipit.invert(lm, lm.capture(input_ids=ids, layer=2))
    assert found.input_ids == tuple(ids.tolist())
    assert heard
    assert all(position >= n_accepted for n_accepted, position, _ in heard)
    # Nothing is used twice: what was checked at the search's own position is learned from, not overheard as well.
    assert learned + Counter((position, token) for _, position, token in heard) <= judged
