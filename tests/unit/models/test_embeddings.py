"""Equal rows are found whatever their number and place."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sipit.models.embeddings import EmbeddingRows


def _rows(n: int, d: int, seed: int) -> torch.nn.Embedding:
    generator = torch.Generator().manual_seed(seed)
    table = torch.nn.Embedding(n, d)
    table.weight.data = torch.randn(n, d, generator=generator)
    return table


@given(st.integers(0, 2**31), st.integers(8, 60), st.integers(2, 9), st.sampled_from([0.0, 1e-6, 5e-5]))
def test_twins_are_found_wherever_they_stand(seed: int, n: int, d: int, gap: float) -> None:
    table = _rows(n, d, seed)
    copies = list(range(1, n, 7))
    table.weight.data[copies] = table.weight.data[0] * (1 + gap)
    rows = EmbeddingRows(table, n)
    family = {0, *copies}
    for token in family:
        assert family - {token} <= set(rows.twins(token))


@given(st.integers(0, 2**31), st.integers(2, 60))
def test_rows_a_hundredth_of_their_norm_apart_are_no_twins(seed: int, n: int) -> None:
    table = _rows(n, 8, seed)
    weight = table.weight.data
    weight[1] = weight[0] * 1.01
    rows = EmbeddingRows(table, n)
    assert all(rows.twins(token) == [] for token in range(n))


def test_nearest_twins_come_first_and_a_crowd_is_cut_short() -> None:
    table = _rows(100, 4, 2)
    weight = table.weight.data
    weight[10:100] = weight[0]
    weight[5] = weight[0] * (1 + 2e-5)
    twins = EmbeddingRows(table, 100).twins(0)
    assert 1 <= len(twins) <= 64
    assert set(twins) <= {5, *range(10, 100)}
    assert twins[0] != 5


def test_twins_of_a_zero_row_are_the_other_zero_rows() -> None:
    table = _rows(20, 4, 0)
    table.weight.data[[3, 8, 9]] = 0
    assert set(EmbeddingRows(table, 20).twins(8)) == {3, 9}


def test_squared_distances_equal_the_whole_table_at_once() -> None:
    n = 8192 * 2 + 5  # more than two slices
    table = _rows(n, 3, 1)
    vector = torch.tensor([0.1, -0.2, 0.3])
    expected = (table.weight.double() - vector.double()).square().sum(dim=1)
    got = EmbeddingRows(table, n).squared_distances(vector)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
