"""The states of tokens that were run as a prompt's first one, kept for the next prompt.

A first state depends on its token and nothing else. Where a position's tolerance is so wide that the whole vocabulary
is tried there (an 8-bit dump, whose first row has one massive coordinate), the first prompt pays for that, and the
others read what it ran. What is kept is compared with the rows as any state is; a token that is accepted by it is
run again, in the pass that keeps it as the prefix of what follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.models import LanguageModel
from sipit.observations import Cut

_MOST_BYTES = 1 << 29  # of the states of all tokens: logits of a large vocabulary are not kept


class FirstStates:
    """States of tokens as the first of a prompt, at one cut, as far as they were run."""

    def __init__(self, vocab_size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._states = torch.empty(vocab_size, width, dtype=dtype, device=device)  # (V, W)
        self._is_run = torch.zeros(vocab_size, dtype=torch.bool)  # (V,)

    def note(self, token_ids: Tensor, states: Tensor) -> None:
        """Keep the states of tokens. (N,), (N, W)."""
        ids = token_ids.cpu()
        self._states[ids.to(self._states.device)] = states.to(self._states)
        self._is_run[ids] = True

    @property
    def token_ids(self) -> Tensor:
        """The tokens that were run. (N,)."""
        return self._is_run.nonzero()[:, 0]

    def of(self, token_ids: Tensor) -> Tensor:
        """Return the states of tokens that were run. (N,) → (N, W)."""
        return self._states[token_ids.to(self._states.device)]


def first_states(lm: LanguageModel, cut: Cut, seq_len: int) -> FirstStates | None:
    """Return what is kept of a cut in passes as long as that; None where it would not fit."""
    width = lm.width(cut)
    if lm.vocab_size * width * lm.dtype.itemsize > _MOST_BYTES:
        return None
    return lm.derived(
        ("first states", cut, lm.regime(seq_len)), lambda: FirstStates(lm.vocab_size, width, lm.dtype, lm.device)
    )
