"""Probabilities of the next token behind each beam, under the language model itself.

A share of the probability is spread over the whole vocabulary: a prompt may hold what the model thinks impossible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.inversion.judging.calibration import calibration_prompts
from sipit.inversion.judging.meter import Meter
from sipit.inversion.noise.fast_passes import fast_passes
from sipit.inversion.noise.prefixes import BeamPrefixes
from sipit.inversion.proposals.continuations import opening_log_probabilities
from sipit.models import LanguageModel

_ANY = 0.01  # of the probability: that a token is any of the vocabulary
_ANY_FIRST = 0.1  # the same of a prompt's first token, of which the model knows least


class TokenPrior:
    """The language model behind every beam. B beams, V = vocab_size.

    Args:
        lm: the model.
        known: token ids before the first observed row: (P,).
        meter: charged for every token run.
        max_batch: most tokens in one packed pass.
        seq_len: of the whole prompt.
    """

    def __init__(self, lm: LanguageModel, known: Tensor, meter: Meter, *, max_batch: int, seq_len: int) -> None:
        self._lm, self._meter = lm, meter
        model = lm.cut(lm.final_cut, seq_len=seq_len)
        self._n_blocks = model.layer
        self._passes = fast_passes(lm)
        self._prefixes = BeamPrefixes(model, known[:-1], max_batch=max_batch, passes=self._passes)
        if len(known):
            self.probabilities = self._grown(known[-1:], torch.zeros(1, dtype=torch.long))  # (B, V)
        else:
            self.probabilities = _first(lm, meter)[None]

    def grow(self, token_ids: Tensor, beams: Tensor) -> None:
        """Make new beams of tokens behind old ones. (B',), (B',)."""
        self.probabilities = self._grown(token_ids, beams)

    def _grown(self, token_ids: Tensor, beams: Tensor) -> Tensor:
        finals = self._prefixes.grow(token_ids, beams)  # (B', D)
        self._meter.spend(len(token_ids), self._n_blocks)
        with self._passes():
            return probabilities_behind(self._lm, finals)


def probabilities_behind(lm: LanguageModel, finals: Tensor) -> Tensor:
    """Return probabilities of the token behind each of some final states. (N, D) → (N, V) float32."""
    return _widened(lm.next_token_logits(finals).float().softmax(dim=1), _ANY)


def log_probabilities_along(lm: LanguageModel, input_ids: Tensor, n_known: int, meter: Meter) -> Tensor:
    """Return log-probabilities at every position of a prompt behind its known prefix. (P + T,) → (T, V) float64."""
    finals = lm.cut(lm.final_cut, seq_len=len(input_ids)).ordinary(input_ids)
    meter.spend(len(input_ids), lm.n_layers)
    behind = probabilities_behind(lm, finals[max(n_known - 1, 0) : -1])
    found = behind if n_known else torch.cat([_first(lm, meter)[None].to(behind), behind])
    return found.cpu().double().log()


def _first(lm: LanguageModel, meter: Meter) -> Tensor:
    """Return probabilities of a first token, of a whole text as likely as of one cut out of the middle. (V,)."""
    opening = opening_log_probabilities(lm, meter).float().exp()
    return _widened((opening + anywhere_probabilities(lm, meter).to(opening)) / 2, _ANY_FIRST)


def _widened(probabilities: Tensor, share: float) -> Tensor:
    """Return probabilities with a share of them spread evenly, in place. (…, V)."""
    return probabilities.mul_(1 - share).add_(share / probabilities.shape[-1])


def anywhere_probabilities(lm: LanguageModel, meter: Meter) -> Tensor:
    """Return probabilities of a token somewhere in a text, made once. (V,) float32.

    The mean of the model's predictions behind every token of a few texts; flat without a tokenizer.
    """

    def made() -> Tensor:
        if lm.tokenizer is None:
            return torch.full((lm.vocab_size,), 1 / lm.vocab_size, device=lm.device)
        full = lm.cut(lm.final_cut)
        prompts = calibration_prompts(lm)[-1:]
        meter.spend(sum(len(ids) for ids in prompts), full.layer)
        behind = [lm.next_token_logits(full.ordinary(ids)).float().softmax(dim=1) for ids in prompts]
        return _widened(torch.cat(behind).mean(dim=0), _ANY_FIRST)

    return lm.derived("probabilities anywhere", made)
