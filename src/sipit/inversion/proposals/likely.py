"""Candidates by the model's own next-token probabilities.

The probabilities at position t depend on the tokens before it alone. Where the states after `layer`
blocks were observed, the blocks above can be run on the observed states themselves: one pass gives
the probabilities at every position, before any token is known, for the price of those blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sipit.inversion.inverses.arithmetic import fast_arithmetic
from sipit.inversion.inverses.restored import restored
from sipit.inversion.proposals.continuations import Continuations, opening_log_probabilities
from sipit.inversion.proposals.proposal import Ordered, SearchView


class Likely(Ordered):
    """The whole vocabulary by falling next-token probability. Source of the idea: arXiv 2505.18332."""

    def __init__(self, view: SearchView) -> None:
        super().__init__(view)
        self._finals: Tensor | None = None  # (T, D)
        self._restored = restored(view.lm, view.seen.cut)
        self.can_go_on = view.seen.layer > 0 and self._restored.are_states and view.is_gapless
        self.behind_prefix = Continuations(view)

    def order(self) -> Tensor:
        logs = self.logits([self.view.position])[0] if self.can_go_on else self.behind_prefix.logits()
        return logs.argsort(descending=True, stable=True)

    def logits(self, positions: Sequence[int]) -> Tensor:
        """Return log-probabilities of every token at some positions, but for a constant each. (N, V).

        From the observed states; in bfloat16 where that is fast.
        """
        view = self.view
        if 0 in positions:
            opening = opening_log_probabilities(view.lm, view.meter)  # (V,)
            others = iter(self.logits([p for p in positions if p]) if any(positions) else ())
            return torch.stack([next(others) if p else opening for p in positions])
        with fast_arithmetic(view.lm.device, view.lm.dtype):
            if self._finals is None:
                values, cut = view.values, self._restored.cut
                states = self._restored.rows(values, torch.arange(len(values)))  # (T, D)
                self._finals, n_blocks = view.lm.final_states(states, cut.layer, cut.site)
                view.meter.spend(len(states), n_blocks)
            return view.lm.next_token_logits(self._finals[torch.tensor(positions) - 1])
