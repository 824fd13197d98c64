"""What leaks at each site equals what transformers itself gives out, in every family, and inverts exactly."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import sipit
from sipit import LanguageModel
from sipit.errors import OptionError
from sipit.inversion import certificate_of
from sipit.inversion.evidence.result import Policy
from sipit.inversion.inverses.restored import restored
from sipit.models.sites import SITES
from sipit.models.unrotated import unrotated_keys
from sipit.observations import Cut, Site
from tests.tiny_models import N_LAYERS, random_ids

_DERIVED: tuple[Site, ...] = tuple(site for site in SITES if site not in ("block", "final"))


def _oracle(lm: LanguageModel, ids: Tensor, layer: int, site: Site) -> Tensor:
    """Return by the whole model's own outputs what leaks: (T, W)."""
    with torch.no_grad():
        output = cast(Any, lm.model)(input_ids=ids[None], output_hidden_states=True, past_key_values=DynamicCache())
    if site in ("logits", "log_probs"):
        logits = output.logits[0]
        return cast(Tensor, logits if site == "logits" else logits - logits.logsumexp(dim=1, keepdim=True))
    if site in ("kv", "keys", "values"):
        cached = output.past_key_values.layers[layer]
        keys, values = (part[0].permute(1, 0, 2).reshape(len(ids), -1) for part in (cached.keys, cached.values))
        return cast(Tensor, {"keys": keys, "values": values, "kv": torch.cat([keys, values], dim=1)}[site])
    states = output.hidden_states[layer][0]
    if site.endswith("_unit"):
        return cast(Tensor, states / states.norm(dim=1, keepdim=True))
    return cast(Tensor, states - states.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("site", _DERIVED)
def test_a_site_leaks_what_the_model_gives_out(family_lm: LanguageModel, site: Site) -> None:
    ids = random_ids(12, seed=3)
    layers = [N_LAYERS] if SITES[site].is_behind_all else [0, 2, N_LAYERS - 1]
    for layer in layers:
        seen = family_lm.capture(input_ids=ids, layer=layer, site=site)
        torch.testing.assert_close(seen.states, _oracle(family_lm, ids, layer, site), rtol=1e-4, atol=1e-5)
        assert seen.d_model == family_lm.width(seen.cut)


@pytest.mark.parametrize("site", _DERIVED)
def test_a_packed_pass_gives_the_same_values(family_lm: LanguageModel, site: Site) -> None:
    ids = random_ids(10, seed=4)
    cut = Cut(family_lm.checked_layer(None if SITES[site].is_behind_all else 2, site), site)
    model = family_lm.cut(cut)
    expected = model.ordinary(ids)
    row = model.row(ids[:6])
    wrong = (ids[6] + 1) % family_lm.vocab_size
    values = row.run(torch.stack([wrong, ids[6]]), torch.tensor([6, 6]))
    torch.testing.assert_close(values[1], expected[6], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(values[0], expected[6], rtol=1e-2, atol=1e-3)
    row.keep([1])
    values = row.run(ids[7:8], torch.tensor([7]))  # what was kept is the right token's
    torch.testing.assert_close(values[0], expected[7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", _DERIVED)
def test_a_prompt_comes_back_from_any_site(family_lm: LanguageModel, site: Site) -> None:
    ids = random_ids(9, seed=5)
    layer = None if SITES[site].is_behind_all else 2
    seen = family_lm.capture(input_ids=ids, layer=layer, site=site)
    found = sipit.invert(family_lm, seen)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids.tolist()))
    assert sipit.check_certificate(certificate_of(found), seen, family_lm).holds


@pytest.mark.parametrize("site", _DERIVED)
def test_one_other_token_is_not_accepted_at_any_site(llama: LanguageModel, site: Site) -> None:
    ids = random_ids(9, seed=6)
    layer = None if SITES[site].is_behind_all else 2
    seen = llama.capture(input_ids=ids, layer=layer, site=site)
    found = sipit.invert(llama, seen)
    forged = {**certificate_of(found), "input_ids": [*found.input_ids[:-1], (found.input_ids[-1] + 1) % 150]}
    assert not sipit.check_certificate(forged, seen, llama).holds


@pytest.mark.parametrize("policy", ["likely", "vocabulary", "random", "gradient"])
@pytest.mark.parametrize("site", ["kv", "logits", "block_unit"])
def test_every_policy_works_at_any_site(llama: LanguageModel, site: Site, policy: Policy) -> None:
    ids = random_ids(5, seed=7)
    seen = llama.capture(input_ids=ids, layer=None if site == "logits" else 2, site=site)
    found = sipit.invert(llama, seen, policy=policy)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids.tolist()))


@pytest.mark.parametrize("site", ["logits", "log_probs"])
def test_states_are_restored_from_logits(family_lm: LanguageModel, site: Site) -> None:
    ids = random_ids(12, seed=8)
    seen = family_lm.capture(input_ids=ids, site=site)
    read = restored(family_lm, seen.cut)
    states = family_lm.capture(input_ids=ids, site="final").states
    rows = read.rows(seen.states, torch.arange(len(ids)))
    assert read.cut == family_lm.final_cut
    assert float((rows - states).norm() / states.norm()) < 2e-2


def test_keys_without_their_position_are_alike_at_all_positions(family_lm: LanguageModel) -> None:
    token = torch.full((6,), 17)
    keys = family_lm.capture(input_ids=token, layer=0, site="keys").states
    back = unrotated_keys(family_lm, 0, keys, torch.arange(6))
    if family_lm.name in ("gpt2", "gpt_neo", "opt"):  # positions are added to the embedding, not rotated in
        assert torch.equal(back, keys)
    else:
        assert float((back - back[0]).norm(dim=1).max()) < 1e-3 * float(back[0].norm())


def test_a_site_of_one_layer_needs_none_and_others_do(llama: LanguageModel) -> None:
    assert llama.checked_layer(None, "logits") == N_LAYERS
    with pytest.raises(OptionError, match="needs a layer: pass 0 to 3"):
        llama.checked_layer(None, "kv")
    with pytest.raises(OptionError, match="site 'kv' 0 to 3"):
        llama.checked_layer(N_LAYERS, "kv")
