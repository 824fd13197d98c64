"""Values that an observation does not hold, estimated from those that it does: logits, or coordinates of any rows.

Only proposals use it: what it estimates proves nothing. T rows of W values; D = width of a state, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sipit.inversion.inverses.linear_head import linear_head
from sipit.inversion.inverses.sampled_ids import spread_ids
from sipit.models import LanguageModel
from sipit.observations import Cut, Observation

_ANCHORS = (12, 128)  # prompts of random tokens, and their length, that tell how rows lie
_USED = 4  # held values for each coordinate of a state, at most
_RIDGE = 1e-8


def completed(lm: LanguageModel, seen: Observation, values: Tensor, positions: Sequence[int]) -> Tensor:
    """Return values with those that are not held estimated from the others: (T, W) → (T, W).

    As rows of random tokens lie, the likeliest ones; of logits, those of the likeliest state.

    Args:
        lm: the model.
        seen: the observation, which says what is held.
        values: its rows.
        positions: of the rows, T of them.
    """
    if not seen.is_partial or seen.half_step is None:
        return values
    held = seen.half_step.isfinite().cpu()  # (T, W)
    if seen.site in ("logits", "log_probs"):
        return _logits_completed(lm, seen, values, held)
    mean, spread, first = _how_rows_lie(lm, seen.cut)
    whole = values.clone()
    for row, (position, is_held) in enumerate(zip(positions, held, strict=True)):
        missing = ~is_held
        if not missing.any():
            continue
        if position == 0:  # one token leaves another kind of row, long and nearly constant
            estimate = first[missing]
        else:
            left = values[row].cpu().double()[is_held] - mean[is_held]
            own = spread[is_held][:, is_held]
            estimate = mean[missing] + spread[missing][:, is_held] @ torch.linalg.solve(own, left)
        whole[row, missing.to(whole.device)] = estimate.to(whole)
    return whole


def _logits_completed(lm: LanguageModel, seen: Observation, values: Tensor, held: Tensor) -> Tensor:
    head, (mean, spread, _) = linear_head(lm, seen.site), _how_rows_lie(lm, lm.final_cut)
    whole = values.clone()
    for row, is_held in enumerate(held):
        tokens = is_held.nonzero()[:, 0]
        used = tokens[: _USED * len(mean)]
        weight = head.rows(used)  # (K, D)
        centre = weight.mean(dim=0)
        logits = head.uncapped(values[row][used.to(values.device)]) - head.offset[used]  # (K,)
        left = logits - logits.mean() - (weight - centre) @ mean
        state = mean + _likeliest(weight - centre, left, spread)
        estimate = head.logits(state) + float((logits - weight @ state).mean())  # (V,)
        if head.cap:
            estimate = torch.tanh(estimate / head.cap) * head.cap
        missing = (~is_held).nonzero()[:, 0]
        whole[row, missing.to(whole.device)] = estimate[missing].to(whole)
    return whole


def _likeliest(map_: Tensor, values: Tensor, spread: Tensor) -> Tensor:
    """Return the likeliest x of covariance S where A x is known but for little. (K, D), (K,), (D, D) → (D,)."""
    if len(map_) <= len(spread):
        gram = map_ @ spread @ map_.T  # (K, K)
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        found: Tensor = spread @ map_.T @ torch.linalg.solve(gram, values)
        return found
    normal = map_.T @ map_  # (D, D)
    normal += _RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype)
    solved: Tensor = torch.linalg.solve(normal, map_.T @ values)
    return solved


def _how_rows_lie(lm: LanguageModel, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and covariance of later rows, and the mean of first ones. (W,), (W, W), (W,) float64."""

    def made() -> tuple[Tensor, Tensor, Tensor]:
        n_prompts, wanted = _ANCHORS
        length = min(wanted, lm.max_positions or wanted)
        ids = spread_ids(lm.vocab_size, n_prompts * length, torch.Generator().manual_seed(3)).view(n_prompts, length)
        model = lm.cut(cut)
        rows = torch.stack([model.ordinary_batch(prompt[None])[0] for prompt in ids]).cpu().double()  # (N, L, W)
        later = rows[:, 1:].flatten(0, 1)
        spread = torch.cov(later.T)
        spread += 1e-6 * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
        return later.mean(dim=0), spread, rows[:, 0].mean(dim=0)

    return lm.derived(("how rows lie", cut), made)
