"""The best of each row, chunk by chunk, are those of a plain search; their chances those of a plain softmax."""

from __future__ import annotations

import pytest
import torch

from sipit.inversion.inverses.top import likeliest_of_rows, top_of_rows


@pytest.mark.parametrize("k", [1, 8, 16])
@pytest.mark.parametrize("width", [7, 64, 2048, 5000, 49_152])
def test_best_of_rows_are_those_of_a_plain_search(width: int, k: int) -> None:
    scores = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    scores[0, -3:] = torch.tensor([9.0, 8.0, 7.0])  # the best where no whole chunk is
    scores[1] = -torch.inf
    scores[1, 5] = 0.0
    best, columns = top_of_rows(scores, min(k, width))
    assert torch.equal(best, scores.topk(min(k, width), dim=1).values)
    assert torch.equal(scores.gather(1, columns), best)
    assert all(len(set(row)) == len(row) for row in columns.tolist())


@pytest.mark.parametrize("has_logs", [False, True])
@pytest.mark.parametrize("width", [300, 49_152, 600_000])  # many rows, some and one to a step
def test_chances_are_those_of_a_softmax_over_all(width: int, has_logs: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    scores = torch.randn(30, width, generator=generator)
    scores[::3, 7] += 40  # peaked, where the sum over all is left out
    logs = list(torch.randn(30, width, generator=generator)) if has_logs else None
    token_ids, chances = likeliest_of_rows(scores, 8, (2.0, 0.5), logs)
    logits = 2.0 * scores.double() + (0.5 * torch.stack(logs) if logs is not None else 0.0)
    expected = logits.softmax(dim=1).topk(8, dim=1)
    assert torch.equal(token_ids, expected.indices)
    torch.testing.assert_close(chances.double(), expected.values, rtol=3e-3, atol=1e-9)


def test_chances_are_exact_from_a_claim_on_and_never_below_the_truth_elsewhere() -> None:
    scores = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(0))
    scores[:, 3] += torch.linspace(5, 25, 40)  # from hopeless to certain
    _, exact = likeliest_of_rows(scores, 32, (1.0, 0.0))
    _, bounded = likeliest_of_rows(scores, 32, (1.0, 0.0), exact_from=0.999)
    is_sure = bounded[:, 0] >= 0.999
    assert torch.equal(is_sure, exact[:, 0] >= 0.999)
    assert 0 < int(is_sure.sum()) < 40
    assert torch.equal(bounded[is_sure], exact[is_sure])
    assert bool((bounded[~is_sure] >= exact[~is_sure]).all())
    assert bool((bounded[~is_sure][:, 0] > exact[~is_sure][:, 0]).any())
