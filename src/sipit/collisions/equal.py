"""Rows equal in every value, found by hashing and confirmed by comparing. Knows nothing of language models."""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.collisions.rows import Rows

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes a value


def equal_groups(rows: Rows) -> list[Tensor]:
    """Return the groups of two or more rows that are equal in every value, each by rising row number.

    Zeros of either sign are equal. The hash only sorts: rows that share one are compared.
    """
    hashes = torch.cat([_hashes(part).cpu() for _, part in rows.slices()])  # (N,)
    order = hashes.argsort(stable=True)
    _, counts = hashes[order].unique_consecutive(return_counts=True)
    stops = counts.cumsum(0)
    groups = []
    for count, stop in zip(counts[counts > 1].tolist(), stops[counts > 1].tolist(), strict=True):
        groups += _confirmed(rows, order[stop - count : stop])
    return sorted(groups, key=lambda group: int(group[0]))


def n_equal_pairs(groups: list[Tensor]) -> int:
    """Return how many pairs of rows lie within groups."""
    return sum(len(group) * (len(group) - 1) // 2 for group in groups)


def _hashes(part: Tensor) -> Tensor:
    """Return a 64-bit hash of each row. (n, D) → (n,)."""
    bits = (part + 0.0).view(_INTEGERS[part.element_size()]).long()  # adding 0 turns -0 into 0
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(1 << 62), 1 << 62, (part.shape[1],), generator=generator).to(part.device) * 2 + 1
    return (bits * weights).sum(dim=1)  # modulo 2^64


def _confirmed(rows: Rows, numbers: Tensor) -> list[Tensor]:
    """Split rows of one hash into groups of equal ones."""
    groups = []
    while len(numbers) > 1:
        first = rows.take(numbers[:1])
        same = torch.cat([(rows.take(part) == first).all(dim=1).cpu() for part in numbers.split(1024)])
        if int(same.sum()) > 1:
            groups.append(numbers[same])
        numbers = numbers[~same]
    return groups
