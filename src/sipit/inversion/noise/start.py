"""A first noise model from the rows alone, before any token is known.

States hardly vary along most directions, so what the rows do there is noise. Shapes: T rows, S = width as compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.inversion.noise.token_map import TokenMap
from sipit.observations import Observation

_QUIET = 0.5  # of the directions, those along which states vary least
_DROPPED = 0.005  # share of exact zeros from which coordinates were dropped
_SHIFTED = 4.0  # times the energy of a mean row that noise and states explain along quiet directions
_LEAST = 0.03  # of the states' own deviation along quiet directions: less noise cannot be seen this way


def first_guess(mapped: TokenMap, seen: Observation) -> NoiseModel:
    """Return normal noise of the size that the rows show along quiet directions, a shift where their mean shows one."""
    observed = seen.states.cpu().double()
    zeros = observed == 0
    drops = float(zeros.double().mean()) > _DROPPED
    if drops and mapped.projection is None:
        observed = torch.where(zeros, mapped.centre.cpu().double(), observed)
    rows = as_float64(mapped.compared(observed.to(mapped.mean)))
    lengths = rows.norm(dim=1)
    usual = rows[lengths <= 3 * lengths.median()]
    rows = usual if len(usual) > 1 else rows
    values, vectors = torch.linalg.eigh(as_float64(mapped.covariance))
    quiet = slice(0, max(1, int(_QUIET * len(values))))
    along = (rows - as_float64(mapped.centre)) @ vectors[:, quiet]  # (T, Q)
    own = values[quiet].clamp(min=0)
    mean = along.mean(dim=0)
    spread = (along - mean).square().sum(dim=0) / max(len(along) - 1, 1)
    variance = float(spread.mean() - own.mean())
    kept = 1 - float(zeros.double().mean()) if drops else 1.0
    variance = max(variance / kept, (_LEAST**2) * float(own.mean()), 1e-20)
    explained = float(own.mean()) + variance / max(len(along), 1)  # text lies elsewhere than random tokens do
    is_shifted = len(along) > 3 and float(mean.square().mean()) > _SHIFTED * explained
    shift = _mean_shift(mapped, seen, lengths) if is_shifted and mapped.projection is None else None
    return NoiseModel(spread=torch.tensor([variance**0.5]), shift=shift, drops=drops)


def _mean_shift(mapped: TokenMap, seen: Observation, lengths: Tensor) -> Tensor:
    usual = (lengths <= 3 * lengths.median()).cpu()
    return seen.states.cpu().double()[usual].mean(dim=0) - mapped.centre.cpu().double()
