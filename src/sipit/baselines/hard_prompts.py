"""HardPrompts (PEZ): the whole prompt as continuous vectors, projected to tokens before every gradient.

Adapted to states as the paper compares it: the loss is the squared distance of all rows to the observed ones. It has no
judge of its own, so what it ends with is judged by whether it is the prompt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from sipit.models import LanguageModel
from sipit.observations import Observation

_STARTS = 16_384  # embedding rows that a vector is projected to at once


@dataclass(frozen=True, kw_only=True)
class HardPrompt:
    """The best prompt of a run."""

    input_ids: tuple[int, ...]
    loss: float  # mean squared difference to the observed rows
    n_steps: int
    seconds: float
    n_tokens_run: int  # through all blocks before the cut, backward passes counted twice more


def hard_prompts(
    lm: LanguageModel,
    seen: Observation,
    *,
    n_steps: int = 1000,
    learning_rate: float = 0.1,
    weight_decay: float = 0.1,
    max_seconds: float = float("inf"),
    seed: int = 0,
) -> HardPrompt:
    """Return the best projected prompt that a number of steps finds. Source: arXiv 2302.03668, Alg. 1.

    Args:
        lm: the model.
        seen: all rows of the prompt; its length is known.
        n_steps: of AdamW. Defaults of rate and decay: the authors' code for text prompts.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        max_seconds: after which it stops with the best so far.
        seed: of the rows that it starts from.
    """
    model, target = lm.cut(seen.cut, seq_len=seen.n_positions), seen.states.float().to(lm.device)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(lm.vocab_size, (seen.n_positions,), generator=generator)
    vectors = lm.embeddings.rows(start).float().clone().requires_grad_(True)  # (T, D)
    optimiser = torch.optim.AdamW([vectors], lr=learning_rate, weight_decay=weight_decay)
    best: tuple[float, tuple[int, ...]] = (float("inf"), tuple(start.tolist()))
    began, step = time.perf_counter(), 0
    while step < n_steps and time.perf_counter() - began < max_seconds:
        ids = _nearest(lm, vectors.detach())
        projected = lm.embeddings.rows(ids).float().detach().requires_grad_(True)
        states = model.from_embeddings(projected.to(lm.dtype)).float()  # (T, W)
        loss = (states - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, projected)
        value = float(loss.detach())
        if value < best[0]:
            best = value, tuple(ids.tolist())
        vectors.grad = gradient
        optimiser.step()
        step += 1
    return HardPrompt(
        input_ids=best[1],
        loss=best[0],
        n_steps=step,
        seconds=time.perf_counter() - began,
        n_tokens_run=3 * step * seen.n_positions,
    )


def _nearest(lm: LanguageModel, vectors: torch.Tensor) -> torch.Tensor:
    """Return the token whose embedding row has the largest cosine with each vector. (T, D) → (T,)."""
    units = torch.nn.functional.normalize(vectors, dim=1)
    best = torch.full((len(units),), -torch.inf, device=units.device)
    ids = torch.zeros(len(units), dtype=torch.long, device=units.device)
    for first in range(0, lm.vocab_size, _STARTS):
        tokens = torch.arange(first, min(first + _STARTS, lm.vocab_size))
        rows = torch.nn.functional.normalize(lm.embeddings.rows(tokens).float(), dim=1)
        values, places = (units @ rows.T).max(dim=1)
        ids = torch.where(values > best, places + first, ids)
        best = torch.maximum(best, values)
    return ids.cpu()
