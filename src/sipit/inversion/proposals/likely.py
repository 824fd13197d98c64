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
from sipit.inversion.judging.meter import Meter
from sipit.inversion.proposals.proposal import Ordered, SearchView
from sipit.models import LanguageModel

_OPENERS = ("The end.\n\n", "It was the end of the story.", "    return x\n", "x = 1\n\n")


class Likely(Ordered):
    """The whole vocabulary by falling next-token probability. Source of the idea: arXiv 2505.18332."""

    def __init__(self, view: SearchView) -> None:
        super().__init__(view)
        self._finals: Tensor | None = None  # (T, D)
        self._restored = restored(view.lm, view.seen.cut)
        can_go_on = view.seen.layer > 0 and self._restored.are_states
        self._cache = None if can_go_on else view.lm.cut(view.lm.final_cut).new_cache()

    def order(self) -> Tensor:
        logs = self.logits([self.view.position])[0] if self._cache is None else self.logits_behind_prefix()
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
                values, cut = view.check.observed, self._restored.cut
                states = self._restored.rows(values, torch.arange(len(values)))  # (T, D)
                self._finals, n_blocks = view.lm.final_states(states, cut.layer, cut.site)
                view.meter.spend(len(states), n_blocks)
            return view.lm.next_token_logits(self._finals[torch.tensor(positions) - 1])

    def logits_behind_prefix(self) -> Tensor:
        """Return log-probabilities behind the accepted prefix, but for a constant, by the whole model. (V,).

        For values the model cannot go on from: they need a prefix, one position after the other.
        """
        view, cache = self.view, self._cache
        assert cache is not None
        if view.position == 0:
            return opening_log_probabilities(view.lm, view.meter)
        full = view.lm.cut(view.lm.final_cut, seq_len=view.seen.seq_len)
        cache.truncate(min(cache.length, view.position - 1))
        new = torch.tensor(view.prefix[cache.length :])
        places = torch.arange(cache.length, view.position)
        states = full.packed(cache, new, places, torch.ones(len(new), len(new), dtype=torch.bool).tril())
        cache.keep(range(len(new)))
        view.meter.spend(len(new), full.layer)
        return view.lm.next_token_logits(states[-1:])[0]


def opening_log_probabilities(lm: LanguageModel, meter: Meter) -> Tensor:
    """Return log-probabilities for the first token of a prompt, made once. (V,).

    The mean of the model's predictions after a few texts that have come to an end; flat without a
    tokenizer. A weak order: what stands first in a prompt depends on nothing the model has seen.
    """

    def made() -> Tensor:
        full = lm.cut(lm.final_cut)
        logs = [torch.zeros(lm.vocab_size, device=lm.device)]
        if lm.tokenizer is not None:
            prompts = [lm.encode(text) for text in _OPENERS]
            meter.spend(sum(len(ids) for ids in prompts), full.layer)
            logs = [lm.next_token_logits(full.ordinary(ids)[-1:])[0].log_softmax(dim=0) for ids in prompts]
        return torch.stack(logs).logsumexp(dim=0).log_softmax(dim=0)

    return lm.derived("opening log-probabilities", made)
