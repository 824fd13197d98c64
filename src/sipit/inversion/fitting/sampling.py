"""Let a model write: the windows, and the states it had on the way, which then need no other pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sipit.inversion.inverses.arithmetic import fast_arithmetic
from sipit.inversion.inverses.network import compact
from sipit.models import LanguageModel
from sipit.observations import Cut

_BLOCK = 128  # tokens of the vocabulary whose probabilities are summed first


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
    cuts: Sequence[Cut] = (),
    on_token: Callable[[int], None] = lambda _: None,
) -> Written:
    """Continue windows to `length` tokens, at temperature 1, all at once. (B, P) → (B, L).

    Runs in bfloat16 where the machine is fast at it. `on_token` is told the tokens each window has.
    """
    tapped = lm.tapped([*cuts, lm.final_cut])
    step = windows = start.to(lm.device)
    cache = lm.generation_cache(length)
    found = [torch.empty(*start.shape[:1], length, lm.width(cut), dtype=torch.float16) for cut in cuts]
    with fast_arithmetic(lm.device, lm.dtype):
        while True:
            *at_cuts, final = tapped.states(step, cache)
            here = slice(windows.shape[1] - step.shape[1], windows.shape[1])
            for kept, states in zip(found, at_cuts, strict=True):
                kept[:, here] = compact(states)
            on_token(windows.shape[1])
            if windows.shape[1] >= length:
                return Written(windows=windows.cpu(), states=found)
            step = _drawn(lm.next_token_logits(final[:, -1]), generator)
            windows = torch.cat([windows, step], dim=1)


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token of each row by its probability: a block of the vocabulary first, which is one pass over it.

    (B, V) → (B, 1)
    """
    vocab_size = logits.shape[1]
    mass = F.pad(logits.softmax(dim=1), (0, -vocab_size % _BLOCK)).unflatten(1, (-1, _BLOCK))  # (B, V / 128, 128)
    upto = mass.sum(dim=2).cumsum(dim=1)  # (B, V / 128)
    draw = torch.rand(len(mass), 1, generator=generator).to(mass) * upto[:, -1:]
    block = torch.searchsorted(upto, draw).clamp_(max=upto.shape[1] - 1)  # (B, 1)
    before = torch.cat([torch.zeros_like(draw), upto], dim=1).gather(1, block)
    inside = mass.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].cumsum(dim=1)  # (B, 128)
    return (block * _BLOCK + torch.searchsorted(inside, draw - before)).clamp_(max=vocab_size - 1)
