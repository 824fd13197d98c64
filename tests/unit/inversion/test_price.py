"""When the model's own likelihood is worth a pass of the whole prompt through the blocks above the layer."""

from __future__ import annotations

import pytest

from sipit.inversion.proposals.price import likelihood_pays


@pytest.mark.parametrize(
    ("layer", "n_tokens", "pays"),
    [(5, 64, False), (5, 4096, False), (15, 64, False), (15, 1024, True), (25, 64, True), (30, 64, True)],
)
def test_a_likelihood_is_not_asked_where_it_costs_more_than_the_prompt_itself(
    layer: int, n_tokens: int, *, pays: bool
) -> None:
    assert likelihood_pays(layer, 30 - layer, n_tokens) == pays
