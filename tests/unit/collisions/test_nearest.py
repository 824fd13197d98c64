"""The closest pairs against brute force in float64 and scipy: every screen may only drop what cannot matter."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sipit.collisions import farthest_pair, nearest_pairs, panel, search_between, search_pairs
from sipit.collisions.equal import equal_groups
from sipit.collisions.nearest import NearPair
from sipit.collisions.rows import Rows
from sipit.errors import NonFiniteError, OptionError, ShapeError

SMALL = 1 << 20  # bytes: so little that rows are searched in several panels


def brute(rows: Tensor, k: int) -> list[tuple[float, int, int]]:
    """Return the k closest pairs by float64 differences, all pairs, ties to the lower numbers."""
    wide = rows.double()
    pairs = itertools.combinations(range(len(rows)), 2)
    distances = torch.cat([torch.linalg.vector_norm(wide[i + 1 :] - wide[i], dim=1) for i in range(len(rows))])
    return sorted((float(d), i, j) for (i, j), d in zip(pairs, distances.tolist(), strict=True))[:k]


def as_tuples(pairs: list[NearPair] | tuple[NearPair, ...]) -> list[tuple[float, int, int]]:
    return [(pair.distance, pair.first, pair.second) for pair in pairs]


def assert_same(found: list[tuple[float, int, int]], expected: list[tuple[float, int, int]]) -> None:
    assert [(i, j) for _, i, j in found] == [(i, j) for _, i, j in expected]
    assert [d for d, _, _ in found] == pytest.approx([d for d, _, _ in expected], rel=1e-12, abs=0)


def clustered(n_rows: int, width: int, *, seed: int = 0, offset: float = 0.0, scale: float = 1.0) -> Tensor:
    """Return rows in clusters within clusters, which boxes can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, width, generator=generator) * 10
    rows = centres[torch.randint(12, (n_rows,), generator=generator)]
    return (rows + torch.randn(n_rows, width, generator=generator)) * scale + offset


@pytest.mark.parametrize("memory", [1 << 31, SMALL])
@pytest.mark.parametrize("k", [1, 7, 400])
def test_closest_pairs_equal_brute_force(k: int, memory: int) -> None:
    rows = clustered(900, 24)
    assert_same(as_tuples(search_pairs([rows], k=k, memory=memory).pairs), brute(rows, k))


def test_closest_pair_equals_scipy_and_faiss() -> None:
    import faiss
    from scipy.spatial.distance import pdist

    rows = clustered(1000, 40, seed=4)
    [pair] = nearest_pairs([rows])
    distances = pdist(rows.double().numpy())
    i, j = torch.triu_indices(1000, 1000, offset=1)[:, int(distances.argmin())].tolist()
    assert (pair.first, pair.second) == (i, j)
    assert pair.distance == pytest.approx(distances.min(), rel=1e-12)
    index = faiss.IndexFlatL2(40)
    index.add(rows.numpy())
    squared, neighbours = index.search(rows.numpy(), 2)
    best = int(squared[:, 1].argmin())
    assert sorted((best, int(neighbours[best, 1]))) == [pair.first, pair.second]


@pytest.mark.thorough
def test_boxes_drop_most_pairs_and_none_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "_LEAF", 32)
    rows = clustered(1500, 8)
    found = search_pairs([rows])
    assert found.n_covered == 1500 * 1499 // 2
    assert found.n_projected < found.n_covered / 3
    assert found.n_decided < 2000
    assert_same(as_tuples(found.pairs), brute(rows, 1))


@pytest.mark.parametrize("memory", [1 << 31, SMALL])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_planted_pair_is_found_beside_a_large_common_offset(offset: float, memory: int) -> None:
    rows = torch.randn(1500, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + offset
    rows[1200] = rows[31] + 1e-7 * rows[31].norm() * torch.nn.functional.one_hot(torch.tensor(5), 64)
    [pair] = search_pairs([rows], memory=memory).pairs
    assert (pair.first, pair.second) == (31, 1200)
    assert pair.distance == pytest.approx(float((rows[31] - rows[1200]).norm()), rel=1e-12)


def test_scale_and_units_do_not_matter() -> None:
    rows = clustered(300, 6).double()
    expected = [(i, j) for _, i, j in brute(rows, 5)]
    for scale in (1e-280, 1e-30, 1e30, 1e280):
        assert [(p.first, p.second) for p in nearest_pairs([rows * scale], k=5)] == expected


def test_one_far_row_hides_no_near_pair() -> None:
    rows = clustered(700, 16)
    rows[0] = 3e7  # the first position's states lie like that
    assert_same(as_tuples(nearest_pairs([rows], k=6)), brute(rows, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_decided_by_its_stored_values(dtype: torch.dtype) -> None:
    rows = clustered(400, 12).to(dtype)
    assert_same(as_tuples(nearest_pairs([rows], k=9)), brute(rows, 9))


@given(st.integers(0, 10**6), st.integers(2, 120), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_blocks_and_panels_change_nothing(seed: int, n_rows: int, k: int, n_blocks: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-2, 3, (n_rows, 4), generator=generator).float()  # full of equal rows and ties
    whole = search_pairs([rows], k=k)
    assert as_tuples(whole.pairs) == brute(rows, k)
    split = search_pairs(list(rows.tensor_split(n_blocks)), k=k, memory=SMALL)
    assert as_tuples(split.pairs) == as_tuples(whole.pairs)
    assert (split.n_equal, split.n_covered) == (whole.n_equal, n_rows * (n_rows - 1) // 2)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_order_of_rows_does_not_matter(seed: int) -> None:
    rows = clustered(150, 5, seed=seed % 7)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
    [pair], [moved] = nearest_pairs([rows]), nearest_pairs([rows[order]])
    assert moved.distance == pair.distance
    assert sorted(order[[moved.first, moved.second]].tolist()) == [pair.first, pair.second]


@pytest.mark.parametrize("memory", [1 << 31, SMALL])
def test_pairs_within_a_distance_are_counted_once_each(memory: int) -> None:
    rows = clustered(600, 3)
    rows[50:60] = rows[40]
    rows[300] = rows[7]
    radius = brute(rows, 4000)[-1][0]
    found = search_pairs([rows], k=3, within=radius, memory=memory)
    assert found.n_collisions == sum(d <= radius for d, _, _ in brute(rows, 5000))
    assert found.n_equal == 11 * 10 // 2 + 1
    assert as_tuples(found.pairs) == brute(rows, 3)


def test_signed_zeros_are_equal() -> None:
    rows = torch.tensor([[0.0, 1.0], [3.0, 4.0], [-0.0, 1.0]])
    assert [group.tolist() for group in equal_groups(Rows([rows]))] == [[0, 2]]


def test_rows_that_share_a_hash_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sipit.collisions.equal._hashes", lambda part: torch.zeros(len(part), dtype=torch.long))
    rows = torch.tensor([[1.0], [2.0], [1.0], [3.0], [2.0], [2.0]])
    assert [group.tolist() for group in equal_groups(Rows([rows]))] == [[0, 2], [1, 4, 5]]


@pytest.mark.parametrize("memory", [1 << 31, SMALL])
def test_search_between_pairs_a_row_of_each_side(memory: int) -> None:
    left = clustered(300, 10, seed=1)
    right = torch.cat([left, left[:50] + 0.01])
    found = search_between([left], [right], k=400, within=0.0, memory=memory)
    distances = (left.double()[:, None] - right.double()[None]).norm(dim=2)
    order = distances.flatten().argsort(stable=True)[:400]
    assert [(p.first, p.second - 300) for p in found.pairs] == [(int(n) // 350, int(n) % 350) for n in order]
    assert (found.n_equal, found.n_covered, found.n_collisions) == (300, 300 * 350, 300)


def test_reduced_product_precision_widens_the_screens(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = float(panel.product_error(64, torch.tensor(1.0)))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert float(panel.product_error(64, torch.tensor(1.0))) > 1000 * exact


def test_product_error_bounds_what_products_do() -> None:
    generator = torch.Generator().manual_seed(3)
    for width in (3, 64, 576):
        a, b = (torch.randn(200, width, generator=generator) * 0.02 + 0.3 for _ in range(2))
        exact = (a.double() - b.double()).square().sum(dim=1)
        computed = a.square().sum(dim=1) + b.square().sum(dim=1) - 2 * (a @ b.T).diagonal()
        radii = a.double().norm(dim=1) + b.double().norm(dim=1)
        errors = (computed.double() - exact).abs()
        assert bool((errors <= panel.product_error(width, radii)).all())
        assert float(errors.max()) > 0


def test_projections_never_exceed_distances() -> None:
    rows = Rows([clustered(500, 80, offset=50.0)])
    frame = panel.frame_of(rows)
    placed = panel.Panel(rows, torch.arange(500), frame)
    z, numbers = placed.z.flatten(0, 1).double(), placed.numbers.flatten()
    i, j = torch.triu_indices(500, 500, offset=1)
    shown = (z[i] - z[j]).norm(dim=1)
    true = rows.distances(numbers[i], numbers[j]) * frame.scale
    slack = placed.projection_error(placed.radius.max()) * 2
    assert bool((shown <= true + slack).all())
    assert bool((shown > 0.9 * true).any())


@pytest.mark.parametrize("n_rows", [0, 1])
def test_too_few_rows_have_no_pairs(n_rows: int) -> None:
    assert nearest_pairs([torch.randn(n_rows, 3)], k=2) == []


def test_fewer_pairs_than_asked_for_are_all_returned() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert_same(as_tuples(nearest_pairs([rows], k=50)), brute(rows, 50))


@pytest.mark.parametrize(
    ("blocks", "error", "words"),
    [
        ([], ShapeError, "no block"),
        ([torch.zeros(3)], ShapeError, "block 0 has shape"),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], ShapeError, "block 1 is 4 wide"),
        ([torch.zeros(3, 2), torch.zeros(3, 2).double()], ShapeError, "float64"),
        ([torch.zeros(3, 2, dtype=torch.long)], ShapeError, "floating"),
        ([torch.zeros(3, 2), torch.tensor([[0.0, 1.0], [0.0, float("nan")]])], NonFiniteError, "row 4 "),
        ([torch.tensor([[float("inf"), 0.0]])], NonFiniteError, "row 0 "),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(blocks: list[Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        nearest_pairs(blocks)


def test_bad_options_are_refused() -> None:
    rows = torch.zeros(2, 2)
    with pytest.raises(OptionError, match="k is 0"):
        nearest_pairs([rows], k=0)
    with pytest.raises(OptionError, match="memory"):
        search_pairs([rows], memory=10)
    with pytest.raises(OptionError, match="within"):
        search_pairs([rows], within=-1.0)


def adversarial(seed: int) -> Tensor:
    """Return float64 rows of any size, from the least denormal to the largest number, some far offset, some close."""
    generator = torch.Generator().manual_seed(seed)
    n_rows, width = (int(torch.randint(2, high, (1,), generator=generator)) for high in (24, 9))
    rows = torch.randn(n_rows, width, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-1074, 1021, (n_rows,), generator=generator)
    if seed % 3 == 0:  # one size for all
        exponents[:] = exponents[0]
    if seed % 3 == 1:  # sizes apart by column
        exponents = torch.randint(-1074, 1021, (width,), generator=generator)
    scaled = rows.clone()
    for i, j in itertools.product(range(n_rows), range(width)):
        scaled[i, j] = math.ldexp(float(rows[i, j]), int(exponents[j if seed % 3 == 1 else i]))
    if seed % 2:  # all the rows near one another beside what they share
        scaled[:, 0] = math.ldexp(1.0, int(exponents.max()))
    return scaled


def squared_exactly(rows: list[list[float]], i: int, j: int) -> Fraction:
    return sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(rows[i], rows[j], strict=True)), Fraction(0))


@pytest.mark.parametrize("seed", range(36))
def test_rows_of_any_size_equal_exact_arithmetic(seed: int) -> None:
    rows = adversarial(seed)
    held = rows.tolist()
    n_left = len(rows) // 2
    every = {(i, j): squared_exactly(held, i, j) for i, j in itertools.combinations(range(len(rows)), 2)}
    between = {pair: value for pair, value in every.items() if pair[0] < n_left <= pair[1]}
    for truth, found in (
        (every, search_pairs([rows], k=17, memory=SMALL).pairs),
        (between, search_between([rows[:n_left]], [rows[n_left:]], k=17).pairs),
    ):
        assert len({(pair.first, pair.second) for pair in found}) == len(found) == min(17, len(truth))
        for pair, least in zip(found, sorted(truth.values())[:17], strict=True):
            squared = truth[pair.first, pair.second]
            if math.isfinite(pair.distance):
                step = Fraction(math.ulp(pair.distance))
                assert abs(squared - least) <= least / 10**12 + 4 * step * (step + Fraction(pair.distance))
                assert abs(Fraction(pair.distance) ** 2 - squared) <= squared / 10**12 + 4 * step * (
                    step + Fraction(pair.distance)
                )
            else:
                assert least > Fraction(math.nextafter(math.inf, 0)) ** 2


@pytest.mark.parametrize(
    "rows",
    [
        torch.full((17, 3), 5e-320, dtype=torch.float64),
        torch.rand(257, 64, generator=torch.Generator().manual_seed(0)) * 1e-40,
        torch.rand(5, 130, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e300,
        torch.rand(300, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-310,
    ],
)
def test_tiny_and_huge_rows_equal_brute_force(rows: Tensor) -> None:
    held = rows.double().tolist()
    pairs = itertools.combinations(range(len(rows)), 2)
    expected = sorted((math.dist(held[i], held[j]), i, j) for i, j in pairs)
    for k in (2, 17):
        assert_same(as_tuples(nearest_pairs([rows], k=k)), expected[:k])


def test_distances_that_overflow_come_last_in_order() -> None:
    rows = torch.tensor([[1.7e308], [-1.7e308], [1.6e308], [-1.6e308]], dtype=torch.float64)
    found = as_tuples(nearest_pairs([rows], k=9))
    assert [(i, j) for _, i, j in found] == [(0, 2), (1, 3), (0, 1), (0, 3), (1, 2), (2, 3)]
    assert [d for d, _, _ in found[2:]] == [math.inf] * 4
    assert farthest_pair([rows]).distance == math.inf


def test_a_limit_far_beyond_the_rows_counts_every_pair() -> None:
    assert search_pairs([clustered(301, 5)], within=1e300).n_collisions == 301 * 300 // 2


@pytest.mark.parametrize("seed", range(30))
def test_farthest_of_rows_of_any_size_equals_exact_arithmetic(seed: int) -> None:
    rows = adversarial(seed)
    held = rows.tolist()
    found = farthest_pair([rows])
    most = max(squared_exactly(held, i, j) for i, j in itertools.combinations(range(len(rows)), 2))
    squared = squared_exactly(held, found.first, found.second)
    step = Fraction(math.ulp(found.distance)) if math.isfinite(found.distance) else Fraction(0)
    assert most - squared <= most / 10**12 + 4 * step * (step + Fraction(min(found.distance, 1e308))) or (
        found.distance == math.inf
    )


def test_lists_and_numpy_arrays_are_blocks() -> None:
    rows = clustered(40, 6).double()
    expected = as_tuples(nearest_pairs([rows], k=5))
    held = rows.numpy()
    frozen = held.copy()
    frozen.flags.writeable = False
    given: tuple[Any, ...] = (
        [held],
        [frozen],
        [rows.tolist()],
        [held[::-1][::-1]],
        [held.astype(">f8")],
        rows.view(2, 20, 6),
    )
    for blocks in given:
        assert as_tuples(nearest_pairs(blocks, k=5)) == expected
    between = search_between([held[:20]], [rows.tolist()[20:]], k=5)
    assert between == search_between([rows[:20]], [rows[20:]], k=5)
    assert as_tuples(nearest_pairs([held[::-1]], k=1))[0][0] == expected[0][0]


@pytest.mark.parametrize(
    "blocks",
    [
        None, 5, "rows", [None], ["rows"], [{"a": 1}], [[[1.0, 2.0], [3.0]]], [[["a"]]], [[[10**400]]],
        torch.tensor(1.0),
        [np.array([["a"]])], [np.array([[None]])], [np.array([[1, 2]])], np.ones((2, 2)), [[1.0, 2.0]], [np.array(1.0)],
    ],
)  # fmt: skip
def test_what_is_no_block_of_rows_is_refused(blocks: Any) -> None:
    for search in (nearest_pairs, lambda given: search_between(given, given)):
        with pytest.raises(ShapeError, match=r"pass|convert"):
            search(blocks)
