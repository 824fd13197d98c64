"""The best of many scores, row by row, several times faster than a general search for them on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 64  # neighbouring scores of which the best is found first


def top_of_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the best k of each row, the best first, and their columns. (N, V) → (N, K), (N, K).

    They lie in the k chunks whose own best are the best, or in what does not fill a chunk.
    """
    n_chunks = scores.shape[1] // _CHUNK
    if n_chunks <= 2 * k:
        best = scores.topk(k, dim=1)
        return best.values, best.indices
    whole, rest = scores[:, : n_chunks * _CHUNK], scores[:, n_chunks * _CHUNK :]
    whole = whole.unflatten(1, (n_chunks, _CHUNK))  # (N, C, 64)
    chunks = whole.amax(dim=2).topk(k, dim=1).indices[:, :, None].expand(-1, -1, _CHUNK)  # (N, K, 64)
    inside = torch.arange(scores.shape[1], device=scores.device)
    columns = chunks * _CHUNK + inside[:_CHUNK]
    columns = torch.cat([columns.flatten(1), inside[n_chunks * _CHUNK :].expand(len(scores), -1)], dim=1)
    best = torch.cat([whole.gather(1, chunks).flatten(1), rest], dim=1).topk(k, dim=1)
    return best.values, columns.gather(1, best.indices)
