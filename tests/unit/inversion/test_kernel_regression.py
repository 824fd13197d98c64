"""The kernel's regression against its definition: rectified units without end, and a solve in float64."""

from __future__ import annotations

import torch

from sipit.inversion.inverses.kernel_regression import arc_cosine_kernel, kernel_regression
from sipit.inversion.inverses.network import unit_rms


def _drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_kernel_is_the_mean_product_of_rectified_units() -> None:
    a, b = _drawn(5, 8), _drawn(4, 8, seed=1)
    units = _drawn(8, 400_000, seed=2)
    sampled = 2 * (a @ units).clamp(min=0) @ (b @ units).clamp(min=0).T / units.shape[1] / 8
    torch.testing.assert_close(arc_cosine_kernel(a, b), sampled, atol=0.02, rtol=0.02)
    own = arc_cosine_kernel(a, a).diagonal()
    torch.testing.assert_close(own, a.square().mean(dim=1), atol=1e-3, rtol=1e-3)


def test_the_regression_solves_its_equations() -> None:
    states, keys, asked = _drawn(40, 8), _drawn(40, 3, seed=1), _drawn(6, 8, seed=2)
    found = kernel_regression(states, keys, strength=0.1)
    x = unit_rms(states).double()
    scale = x.std(dim=0)
    scale = scale + 1e-3 * scale.max()

    def standardised(rows: torch.Tensor) -> torch.Tensor:
        return (unit_rms(rows).double() - x.mean(dim=0)) / scale

    gram = arc_cosine_kernel(standardised(states), standardised(states))
    gram += 0.1 * gram.diagonal().mean() * torch.eye(40)
    weights = torch.linalg.solve(gram, keys.double() - keys.double().mean(dim=0))
    expected = arc_cosine_kernel(standardised(asked), standardised(states)) @ weights + keys.double().mean(dim=0)
    torch.testing.assert_close(found.predicted(asked).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found(asked).norm(dim=1), torch.ones(6))


def test_it_reads_what_a_linear_map_cannot() -> None:
    states = _drawn(600, 4)
    keys = (unit_rms(states)[:, :2].prod(dim=1, keepdim=True)).sign() * torch.ones(1, 2)
    found = kernel_regression(states[:500], keys[:500])
    assert float((found.predicted(states[500:]).sign() == keys[500:]).float().mean()) > 0.9


def test_states_that_are_all_the_same_give_finite_queries() -> None:
    states = torch.ones(6, 4)
    assert bool(kernel_regression(states, _drawn(6, 3))(states).isfinite().all())
