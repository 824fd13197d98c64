"""A few values of each row decide as all of them do: exact where they tell tokens apart, and nothing false."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sipit
from sipit import LanguageModel, Observation
from sipit.cli import main
from sipit.errors import InputError
from sipit.inversion import certificate_of, check_certificate
from sipit.inversion.inverses.completed import completed
from sipit.inversion.judging.tolerance import tolerance_for
from sipit.observations import Site, read_observation, write_observation
from tests.tiny_models import FAMILIES, random_ids, tiny_model

IDS = random_ids(8, seed=9)


def _largest(seen: Observation, k: int) -> Observation:
    top = seen.states.topk(k, dim=1)
    states = top.values.amin(1, keepdim=True).expand_as(seen.states).scatter(1, top.indices, top.values).contiguous()
    steps = torch.full(states.shape, torch.inf).scatter(1, top.indices, 0.0)
    return replace(seen, states=states, half_step=steps)


@pytest.mark.parametrize("site", ["logits", "log_probs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_logits_give_the_prompt_back(family: str, site: Site) -> None:
    lm = LanguageModel(tiny_model(family))
    seen = _largest(lm.capture(input_ids=IDS, site=site), 20)
    found = sipit.invert(lm, seen)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert check_certificate(certificate_of(found), seen, lm).holds


@pytest.mark.thorough
def test_another_model_is_unmatched_and_a_changed_value_breaks_the_certificate(llama: LanguageModel) -> None:
    seen = _largest(llama.capture(input_ids=IDS, site="logits"), 20)
    assert (
        sipit.invert(LanguageModel(tiny_model("llama", seed=5)), replace(seen, fingerprint=None)).verdict == "unmatched"
    )
    found = sipit.invert(llama, seen)
    assert seen.half_step is not None
    held = seen.half_step.isfinite()
    moved = replace(seen, states=seen.states + 0.01 * held)
    record = certificate_of(replace(found, observation_sha256=moved.digest()))
    assert not check_certificate(record, moved, llama).holds
    unheld = replace(seen, states=seen.states - 5.0 * ~held)  # what is not held has no say
    record = certificate_of(replace(found, observation_sha256=unheld.digest()))
    assert check_certificate(record, unheld, llama).holds


def test_estimates_of_what_is_not_held_keep_what_is(llama: LanguageModel) -> None:
    whole = llama.capture(input_ids=IDS, site="logits")
    seen = _largest(whole, 60)  # more than the states are wide: they are known but for rounding
    assert seen.half_step is not None
    estimate = completed(llama, seen, seen.states, range(seen.seq_len))
    held = seen.half_step.isfinite()
    assert torch.equal(estimate[held], seen.states[held])
    assert torch.allclose(estimate, whole.states, atol=1e-3)


def _dropped(seen: Observation, share: float) -> Observation:
    kept = torch.rand(seen.states.shape, generator=torch.Generator().manual_seed(4)) >= share
    kept[:, 0] |= ~kept.any(dim=1)
    return replace(seen, states=seen.states * kept, half_step=torch.where(kept, 0.0, torch.inf))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["block", "final", "keys", "kv"])
def test_rows_of_any_site_may_lack_values(family: str, site: Site) -> None:
    lm = LanguageModel(tiny_model(family))
    seen = _dropped(lm.capture(input_ids=IDS, layer=None if site == "final" else 2, site=site), 0.5)
    found = sipit.invert(lm, seen)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))
    assert check_certificate(certificate_of(found), seen, lm).holds
    estimate = completed(lm, seen, seen.states, range(seen.seq_len))
    held = torch.as_tensor(seen.half_step).isfinite()
    assert torch.equal(estimate[held], seen.states[held])


def test_rows_behind_a_known_prefix_or_a_hole_may_lack_values(llama: LanguageModel) -> None:
    whole = llama.capture(input_ids=IDS, layer=2)
    prefix = tuple(IDS[:3].tolist())
    behind = replace(whole, states=whole.states[3:], known_prefix=prefix, positions=(3, 4, 5, 6, 7))
    found = sipit.invert(llama, _dropped(behind, 0.5))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS[3:].tolist()))
    every_second = replace(whole, states=whole.states[1::2], positions=(1, 3, 5, 7))
    found = sipit.invert(llama, _dropped(every_second, 0.3))
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS.tolist()))


@pytest.mark.parametrize(("n_held", "is_open"), [(1, True), (4, False)])
def test_rows_of_few_values_give_nothing_wrong(llama: LanguageModel, n_held: int, is_open: bool) -> None:
    """Of one value what arithmetic explains may hold another token's, so all of them are tried."""
    for seed in range(4):
        ids = random_ids(6, seed=60 + seed)
        seen = llama.capture(input_ids=ids, layer=2)
        held = torch.arange(seen.d_model) < n_held
        rows = replace(seen, states=seen.states * held, half_step=torch.where(held, 0.0, torch.inf).expand(6, -1))
        assert tolerance_for(llama, rows).is_open[1:].tolist() == [is_open] * 5
        found = sipit.invert(llama, rows)
        if found.verdict == "recovered":
            assert found.input_ids == tuple(ids.tolist())
        for token, one in zip(ids.tolist(), found.positions, strict=False):
            assert token in (one.token_id, *(rival.token_id for rival in one.rivals))


def test_rows_that_hold_nothing_are_refused(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=IDS, layer=2)
    with pytest.raises(InputError, match="finite somewhere in each row"):
        replace(seen, half_step=torch.full(seen.states.shape, torch.inf))


@pytest.mark.thorough
def test_files_and_the_command_line_take_them(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = sipit.load(str(text_folder))
    seen = _largest(lm.capture("few of many", site="logits"), 30)
    write_observation(seen, tmp_path / "own")
    assert read_observation(tmp_path / "own").digest() == seen.digest()
    top = lm.capture("few of many", site="logits").states.topk(30, dim=1)
    torch.save({"values": top.values, "indices": top.indices}, tmp_path / "top.pt")
    record = tmp_path / "record.json"
    for name in ("own", "top.pt"):
        model = ["--model", str(text_folder)]
        assert main(["invert", str(tmp_path / name), *model, "--no-fit", "--json", str(record)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "few of many"
        assert main(["check", str(record), str(tmp_path / name), *model]) == 0
