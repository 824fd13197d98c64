"""The best of each row, chunk by chunk, are those of a plain search."""

from __future__ import annotations

import pytest
import torch

from sipit.inversion.inverses.top import top_of_rows


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
