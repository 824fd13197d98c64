"""How many dimensions a set of states fills locally."""

from __future__ import annotations

from torch import Tensor


def intrinsic_dimension(rows: Tensor) -> dict[str, float] | None:
    """Return two estimates of the dimension that states fill locally; None where scikit-dimension is not installed.

    Sources: Facco et al. 2017 (TwoNN), Levina and Bickel 2004 (maximum likelihood).
    """
    try:
        from skdim.id import MLE, TwoNN
    except ImportError:
        return None
    points = rows.unique(dim=0).numpy()
    return {"two_nn": float(TwoNN().fit(points).dimension_), "mle": float(MLE().fit(points).dimension_)}
