"""What the model itself expects behind the accepted prefix: tokens, and sequences of several.

By the whole model, one pass of what the prefix gained. Needs no observed state, so it serves where
none can be gone on from, and where none is held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.inversion.judging.meter import Meter
from sipit.inversion.proposals.proposal import SearchView
from sipit.models import LanguageModel
from sipit.models.packed_row import in_turn

_OPENERS = ("The end.\n\n", "It was the end of the story.", "    return x\n", "x = 1\n\n")
_WIDTH = 64  # sequences gone on from, of those that are as yet one token short


class Continuations:
    """The model's next-token probabilities behind the prefix of one search."""

    def __init__(self, view: SearchView) -> None:
        self._view = view
        self._full = view.lm.cut(view.lm.final_cut, seq_len=view.seen.n_positions)
        self._row = self._full.row()
        self._logits: tuple[int, Tensor] | None = None  # position, and (V,) there

    def logits(self) -> Tensor:
        """Return log-probabilities at the position behind the accepted prefix, but for a constant. (V,)."""
        view, row = self._view, self._row
        if view.position == 0:
            return opening_log_probabilities(view.lm, view.meter)
        if self._logits is None or self._logits[0] != view.position:
            row.truncate(view.position - 1)
            new = torch.tensor(view.prefix[row.length :])
            states = row.extend(new)
            view.meter.spend(len(new), self._full.layer)
            self._logits = view.position, view.lm.next_token_logits(states[-1:])[0]
        return self._logits[1]

    def sequences(self, length: int, n: int) -> Tensor:
        """Return the likeliest n sequences of tokens behind the prefix, the likeliest first. (N, length).

        All of the vocabulary's where they are of one token and n allows it. Longer ones go on from the
        likeliest that are one token shorter, so the n are not always the very likeliest.
        """
        logs = self.logits().float().log_softmax(dim=0).cpu()  # (V,)
        values, order = logs.sort(descending=True, stable=True)
        found, nats = order[:, None], values  # (N, 1), (N,)
        for _ in range(length - 1):
            found, nats = found[:_WIDTH], nats[:_WIDTH]
            joint = nats[:, None] + self._behind(found).cpu()  # (N, V)
            nats, flat = joint.flatten().topk(min(n, joint.numel()))
            parents, tokens = flat // joint.shape[1], flat % joint.shape[1]
            found = torch.cat([found[parents], tokens[:, None]], dim=1)
        return found[:n]

    def _behind(self, sequences: Tensor) -> Tensor:
        """Return log-probabilities of what follows each of some sequences behind the prefix. (N, L) → (N, V)."""
        view = self._view
        n, length = sequences.shape
        attends = torch.block_diag(*[in_turn(length)] * n).bool()
        places = torch.arange(view.position, view.position + length).repeat(n)
        self._row.truncate(view.position)
        states = self._row.run(sequences.flatten(), places, attends)  # (N * L, D)
        view.meter.spend(n * length, self._full.layer)
        return view.lm.next_token_logits(states[length - 1 :: length]).float().log_softmax(dim=1)


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
