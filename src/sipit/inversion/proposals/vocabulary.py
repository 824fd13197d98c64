"""Orders that know nothing: by token id, and at random (the paper's BruteForce, Alg. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.inversion.proposals.proposal import Ordered


class VocabularyOrder(Ordered):
    """By rising token id."""

    def order(self) -> Tensor:
        return torch.arange(self.view.lm.vocab_size)


class RandomOrder(Ordered):
    """Uniform without replacement, from the search's seed. Source: arXiv 2510.15511, Alg. 2."""

    def order(self) -> Tensor:
        return torch.randperm(self.view.lm.vocab_size, generator=self.view.generator)
