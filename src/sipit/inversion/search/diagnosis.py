"""Why nothing fits at a position, as far as the observed rows and what was checked there tell."""

from __future__ import annotations

import torch
from torch import Tensor

_STANDS_OUT = 40.0  # times nearer than all others: hardly a chance resemblance
_UNIT = 1e-3  # of 1, for rows that were all brought to unit length


def diagnosed(
    observed: Tensor, position: int, *, distance: float, runner_up: float | None, limit: float, dtype: str
) -> str:
    """Return one sentence on the likeliest cause of a miss, and what to try.

    Args:
        observed: all observed states, (T, D).
        position: where nothing fits.
        distance: L2 of the nearest token.
        runner_up: L2 of the next one.
        limit: tolerance there.
        dtype: of the model.
    """
    norms = observed.norm(dim=1)
    row = observed[position]
    equal = (observed[:position] == row).all(dim=1).nonzero()[:, 0]
    if not bool(row.any()):
        return "the row is all zeros, as padding is; cut the rows that are no tokens"
    if len(equal):
        return f"the row equals row {int(equal[0])}, as copied or padded rows do; cut the rows that are no tokens"
    if len(observed) > 1 and bool(torch.isclose(norms, torch.ones_like(norms), atol=_UNIT).all()):
        return "every row has length 1, so the states were normalised; capture them as they are"
    if distance <= limit:
        return (
            "the nearest token is within the plain tolerance, but some coordinates are off by more than the rounding "
            "of the stored dtype; the values were changed after they were rounded"
        )
    if runner_up is not None and distance * _STANDS_OUT < runner_up:
        return (
            f"the nearest token stands out ({runner_up / distance:.0f} times nearer than the next), so this is the "
            f"model, but something else than {dtype} arithmetic moved the state: try the --dtype it was captured in, "
            f"or declare --noise {1.1 * distance:.2g}"
        )
    if position == 0:
        return "no token stands out: wrong model, layer or site, or the first rows of the prompt are missing"
    return "no token stands out: rows from here on may belong to another prompt, or an earlier token is wrong"
