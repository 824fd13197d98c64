"""Last-token states of many prompts at several cuts in one pass, a batch of equally long ones at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sipit.errors import NonFiniteError
from sipit.models import LanguageModel
from sipit.models.quantized import mixes_rows
from sipit.observations import Cut

OnStep = Callable[[int, int], None]  # done, total

MAX_TOKENS = 2048  # of one batch


def last_states(
    lm: LanguageModel,
    prompts: Sequence[Tensor],
    cuts: Sequence[Cut],
    *,
    max_tokens: int = MAX_TOKENS,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """Return the state of each prompt's last token at each cut. N prompts of (T,) → one (N, D) a cut, on the CPU.

    Prompts run together only with prompts of their own length, so no padding can leak into a state; each
    runs alone in a model that lets the rows of a batch act on one another (LLM.int8).

    Args:
        lm: the model.
        prompts: token ids.
        cuts: (layer, site) pairs, in the order wanted.
        max_tokens: of one batch; bounds the memory.
        on_step: told the prompts done and in all.
    """
    tapped = lm.tapped(cuts)
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(prompts):
        by_length[len(ids)].append(number)
    if mixes_rows(lm.model):
        max_tokens = 1
    found = [torch.empty(len(prompts), lm.width(cut), dtype=lm.dtype) for cut in cuts]
    done = 0
    for length, numbers in sorted(by_length.items()):
        size = max(1, max_tokens // length)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            batch = torch.stack([prompts[i] for i in part])  # (B, T)
            for out, states in zip(found, tapped.states(batch), strict=True):
                out[part] = states[:, -1].cpu()  # (B, D)
            done += len(part)
            if on_step is not None:
                on_step(done, len(prompts))
    return found


def finite_states(cuts: Sequence[Cut], states: Sequence[Tensor], *, first: int) -> list[Tensor]:
    """Return the states of some prompts at each cut, if all are finite. (N, D) each.

    Args:
        cuts: (layer, site) of each.
        states: as `last_states` returns them.
        first: number of their first prompt, for the message.

    Raises:
        NonFiniteError: the model's states overflow.
    """
    for (layer, site), rows in zip(cuts, states, strict=True):
        finite = torch.isfinite(rows).all(dim=1)
        if not bool(finite.all()):
            number = first + int((~finite).nonzero()[0, 0])
            raise NonFiniteError(
                f"prompt {number}: its state after {layer} blocks, site {site}, overflows {rows.dtype}; "
                "load the model in a wider dtype"
            )
    return list(states)
