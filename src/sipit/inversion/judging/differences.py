"""Along which coordinates wrong tokens' states differ from a right one's: measured, as the noise floor is.

A box of a rounding is wide along some coordinates and narrow along others. Whether another token's state may lie in it
depends on how much of the distance between two tokens' states falls on each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.judging.calibration import calibration_prompts
from sipit.inversion.judging.noise import CLEAR, noise_floor
from sipit.models import LanguageModel
from sipit.observations import Cut

_TOKENS = 32  # run behind each half of a calibration prompt
_SHORTEST = 4  # tokens of a calibration prompt that has a half to run them behind


def coordinate_shares(lm: LanguageModel, cut: Cut, seq_len: int | None = None) -> Tensor:
    """Return the root mean square of each coordinate of such differences, of mean square 1 over all. (W,) float64.

    Of each of some tokens behind a prefix, the difference to the nearest other one that is not alike counts, at length
    1. Measured once per cut, at later positions than the first; `seq_len` as in `LanguageModel.cut`. All 1 where all
    tokens are alike.
    """
    return lm.derived(("coordinate shares", cut, lm.regime(seq_len)), lambda: _measured(lm, cut, seq_len))


def _measured(lm: LanguageModel, cut: Cut, seq_len: int | None) -> Tensor:
    model, floor = lm.cut(cut, seq_len=seq_len), noise_floor(lm, cut, seq_len)
    generator = torch.Generator().manual_seed(3)
    energy, n_pairs = torch.zeros(lm.width(cut), dtype=torch.float64), 0
    for ids in calibration_prompts(lm):
        if len(ids) < _SHORTEST:
            continue
        prefix = ids[: len(ids) // 2]
        tokens = torch.randperm(lm.vocab_size, generator=generator)[:_TOKENS]
        states = as_float64(model.row(prefix).run(tokens, torch.full_like(tokens, len(prefix)))).cpu()  # (N, W)
        distances = torch.cdist(states, states)  # (N, N)
        alike = CLEAR * floor.rest_gap * states.norm(dim=1, keepdim=True)
        nearest = distances.masked_fill(distances <= alike, torch.inf).min(dim=1)  # (N,), its own among the alike
        apart = nearest.values.isfinite()
        pairs = (states - states[nearest.indices])[apart] / nearest.values[apart][:, None]
        energy += pairs.double().square().sum(dim=0)
        n_pairs += len(pairs)
    return (energy * len(energy) / n_pairs).sqrt() if n_pairs else torch.ones_like(energy)
