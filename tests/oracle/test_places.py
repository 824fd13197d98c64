"""identify names where rows come from and nothing else; verify finds every planted fault and blames no good row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel, Observation
from sipit.errors import InputError, ShapeError
from sipit.inversion.places import identify, verify
from sipit.models.sites import SITES
from sipit.observations import Cut, Site
from tests.tiny_models import N_LAYERS, VOCAB, random_ids, tiny_model

IDS = random_ids(9, seed=5)
_LAYER = 2


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(tiny_model("llama"), name="llama")


def _cuts(lm: LanguageModel) -> list[Cut]:
    return [
        Cut(layer, site)
        for site, spec in SITES.items()
        for layer in range(spec.first_layer(lm.n_layers), spec.last_layer(lm.n_layers) + 1)
    ]


def _says_the_same(lm: LanguageModel, one: Cut, other: Cut) -> bool:
    """Whether two cuts have one state: a unit row of layer 0 is one of the embedding, for example."""
    first, second = (lm.capture(input_ids=IDS, layer=cut.layer, site=cut.site).states for cut in (one, other))
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_every_layer_and_site_is_identified(family: str, with_ids: bool) -> None:
    lm = LanguageModel(tiny_model(family), name=family)
    for cut in _cuts(lm):
        rows = lm.capture(input_ids=IDS, layer=cut.layer, site=cut.site).states
        found = identify(lm, rows, input_ids=IDS.tolist() if with_ids else None)
        places = [Cut(fit.layer, fit.site) for fit in found.fits]  # type: ignore[arg-type]
        assert cut in places or any(_says_the_same(lm, cut, place) for place in places), (cut, found)
        assert all(fit.scale == 1.0 and fit.offset == 0 and fit.distance <= fit.tolerance for fit in found.fits)


@pytest.mark.parametrize("scale", [0.125, 1.7, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_is_measured(lm: LanguageModel, scale: float, dtype: torch.dtype) -> None:
    rows = (lm.capture(input_ids=IDS, layer=_LAYER).states * scale).to(dtype).float()
    fit = identify(lm, rows).fits[0]
    assert (fit.layer, fit.site) == (_LAYER, "block")
    assert fit.scale == pytest.approx(scale, rel=2e-3)


@pytest.mark.parametrize("n", [1, 3])
def test_rows_of_padding_are_an_offset(lm: LanguageModel, n: int) -> None:
    rows = lm.capture(input_ids=IDS, layer=_LAYER).states
    fit = identify(lm, torch.cat([torch.zeros(n, rows.shape[1]), rows])).fits[0]
    assert (fit.layer, fit.offset) == (_LAYER, n)


@pytest.mark.thorough
def test_places_joined_in_columns_are_told_apart(lm: LanguageModel) -> None:
    layers = (3, 1, 4)
    rows = torch.cat([lm.capture(input_ids=IDS, layer=layer).states for layer in layers], dim=1)
    found = identify(lm, rows)
    by_columns = {fit.columns: fit.layer for fit in found.fits if fit.site == "block"}
    assert by_columns == {(32 * n, 32 * n + 32): layer for n, layer in enumerate(layers)}


def _columns_shuffled(rows: Tensor) -> Tensor:
    return rows[:, torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows[1:],
        lambda rows: torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)) * rows.std(),
        _columns_shuffled,
        lambda rows: rows + rows.norm() / 50,
        lambda rows: torch.cat([rows[:1], rows.flip(0)]),
        lambda rows: -rows,
        torch.zeros_like,
        lambda rows: rows[:, :-1],
    ],
)
def test_what_is_something_else_fits_nothing(lm: LanguageModel, spoil: Callable[[Tensor], Tensor]) -> None:
    rows = lm.capture(input_ids=IDS, layer=_LAYER).states
    assert identify(lm, rows).fits
    assert identify(lm, spoil(rows)).fits == ()


def test_states_of_another_model_fit_nothing(lm: LanguageModel) -> None:
    other = LanguageModel(tiny_model("llama", seed=1))
    assert identify(lm, other.capture(input_ids=IDS, layer=_LAYER).states).fits == ()


def test_no_rows_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ShapeError):
        identify(lm, torch.zeros(0, 32))


# verify


def _seen(lm: LanguageModel, rows: Tensor, layer: int = _LAYER, site: Site = "block") -> Observation:
    return Observation(states=rows, layer=layer, site=site)


@pytest.mark.parametrize("site", ["block", "final", "values", "logits", "block_centred"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_good_rows_hold(lm: LanguageModel, site: Site, dtype: str) -> None:
    layer = None if SITES[site].is_behind_all else _LAYER
    for seed in range(3):
        ids = random_ids(9, seed=seed)
        seen = lm.capture(input_ids=ids, layer=layer, site=site, dtype=dtype)
        found = verify(lm, seen, ids)
        assert found.holds, found


OTHER = random_ids(9, seed=6)


def _place(lm: LanguageModel, layer: int, site: Site = "block", ids: Tensor = IDS) -> Tensor:
    return lm.capture(input_ids=ids, layer=layer, site=site).states


# what is put in place of row 4 → what it is said to be
_FAULTS: dict[str, tuple[Callable[[LanguageModel, Tensor], Tensor], str]] = {
    "a layer early": (lambda lm, _: _place(lm, _LAYER - 1)[4], "layer 1, site block, position 4"),
    "a layer late": (lambda lm, _: _place(lm, _LAYER + 1)[4], "layer 3, site block, position 4"),
    "after the norm": (lambda lm, _: _place(lm, N_LAYERS, "final")[4], "site final, position 4"),
    "shifted by one": (lambda _, rows: rows[3], "layer 2, site block, position 3"),
    "another prompt": (lambda lm, _: _place(lm, _LAYER, ids=OTHER)[4], "prompt 1 of these: layer 2"),
    "scaled": (lambda _, rows: rows[4] * 1.5, "its own state times 1.5"),
    "zeros": (lambda _, rows: rows[4] * 0, "zeros"),
    "noise": (lambda _, rows: rows[4] + rows[4].norm() * 0.1 * _unit_noise(), "of its length away"),
    "columns in another order": (lambda _, rows: _columns_shuffled(rows)[4], "columns in another order"),
    "unit length": (lambda _, rows: rows[4] / rows[4].norm(), "its own state times"),
    "block output alone": (
        lambda lm, rows: rows[4] - _place(lm, _LAYER - 1)[4],
        "what block 1 adds at position 4, without the residual stream",
    ),
    "noise that is slight": (lambda _, rows: rows[4] + rows[4].norm() * 1e-3 * _unit_noise(), "of its length away"),
}


def _unit_noise() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(2)), dim=0)


@pytest.mark.parametrize("kind", _FAULTS)
def test_planted_fault_is_found_and_named_and_no_other_row_is_blamed(lm: LanguageModel, kind: str) -> None:
    plant, says = _FAULTS[kind]
    rows = _place(lm, _LAYER).clone()
    rows[4] = plant(lm, rows)
    found = verify(lm, _seen(lm, rows), IDS, others=[IDS.tolist(), OTHER.tolist()])
    assert [bad.row for bad in found.bad_rows] == [4]
    assert says in str(found.bad_rows[0].instead)
    assert found.bad_rows[0].distance > found.bad_rows[0].tolerance


def test_one_vector_added_to_all_rows_is_named(lm: LanguageModel) -> None:
    rows = _place(lm, _LAYER) + 0.1 * _unit_noise()
    found = verify(lm, _seen(lm, rows), IDS)
    assert len(found.bad_rows) == 9
    assert "plus a vector of length 0.1" in str(found.bad_rows[0].instead)


def test_wrong_id_spoils_the_rows_from_its_position_on(lm: LanguageModel) -> None:
    ids = IDS.clone()
    ids[5] = (ids[5] + 1) % VOCAB
    found = verify(lm, _seen(lm, _place(lm, _LAYER)), ids)
    assert [bad.row for bad in found.bad_rows] == [5, 6, 7, 8]


@pytest.mark.parametrize("n", [1, 4])
def test_rows_that_a_cache_hit_left_out_are_no_fault(lm: LanguageModel, n: int) -> None:
    found = verify(lm, _seen(lm, _place(lm, _LAYER)[n:]), IDS)
    assert found.holds
    assert found.first_position == n


def test_rows_beyond_the_ids_are_bad(lm: LanguageModel) -> None:
    rows = _place(lm, _LAYER)
    found = verify(lm, _seen(lm, torch.cat([rows, rows[-1:]])), IDS)
    assert [bad.row for bad in found.bad_rows] == [9]


def test_ids_outside_the_vocabulary_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError):
        verify(lm, _seen(lm, _place(lm, _LAYER)), [*IDS.tolist()[:-1], VOCAB])


def test_fingerprint_of_another_model_is_refused(lm: LanguageModel) -> None:
    other = LanguageModel(tiny_model("llama", seed=1))
    with pytest.raises(InputError):
        verify(lm, replace(other.capture(input_ids=IDS, layer=_LAYER)), IDS)
