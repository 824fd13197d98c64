"""Let a model write: the windows, and the states it had on the way, which then need no other pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.arithmetic import fast_arithmetic
from sipit.inversion.fitting.network import compact
from sipit.models import LanguageModel
from sipit.observations import Site


@dataclass(frozen=True, kw_only=True)
class Written:
    """Windows that a model wrote."""

    windows: Tensor  # (B, L)
    states: list[Tensor]  # at each cut (B, L, D), compact


@torch.no_grad()
def written_on(
    lm: LanguageModel,
    start: Tensor,
    length: int,
    generator: torch.Generator,
    *,
    cuts: Sequence[tuple[int, Site]] = (),
    on_token: Callable[[int], None] = lambda _: None,
) -> Written:
    """Continue windows to `length` tokens, at temperature 1, all at once. (B, P) → (B, L).

    Runs in bfloat16 where the machine is fast at it. `on_token` is told the tokens each window has.
    """
    tapped = lm.tapped([*cuts, (lm.n_layers, "final")])
    step = windows = start.to(lm.device)
    cache = lm.generation_cache(length)
    found = [torch.empty(*start.shape[:1], length, lm.width(site), dtype=torch.float16) for _, site in cuts]
    with fast_arithmetic(lm.device):
        while True:
            *at_cuts, final = tapped.states(step, cache)
            here = slice(windows.shape[1] - step.shape[1], windows.shape[1])
            for kept, states in zip(found, at_cuts, strict=True):
                kept[:, here] = compact(states)
            on_token(windows.shape[1])
            if windows.shape[1] >= length:
                return Written(windows=windows.cpu(), states=found)
            mass = lm.next_token_logits(final[:, -1]).softmax(dim=1).cumsum(dim=1)  # (B, V)
            draw = torch.rand(len(start), 1, generator=generator).to(mass) * mass[:, -1:]
            step = torch.searchsorted(mass, draw).clamp_(max=lm.vocab_size - 1)  # (B, 1)
            windows = torch.cat([windows, step], dim=1)
