"""The random tokens that regressions are made on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spread_ids(vocab_size: int, n: int, generator: torch.Generator) -> Tensor:
    """Return random tokens, half of them uniform, half log-uniform in the token id. (N,).

    Tokenizers built by merging number their tokens by falling frequency, and the embeddings of
    frequent tokens lie apart from the others.
    """
    uniform = torch.rand(n, generator=generator)
    ids = (uniform * vocab_size).long()
    frequent = torch.exp(torch.rand(n, generator=generator) * math.log(vocab_size)).long()
    return torch.where(torch.rand(n, generator=generator) < 0.5, ids, frequent).clamp_(max=vocab_size - 1)


def frequent_and_other_ids(vocab_size: int, n: int, generator: torch.Generator) -> Tensor:
    """Return different tokens: the n/2 of the lowest ids, which are frequent ones, and others at random. (N,).

    A regression serves the tokens it was made on best, so frequent ones are all among them, once each:
    drawn again and again they would outweigh the rest.
    """
    n_low = min(n // 2, vocab_size)
    others = n_low + torch.randperm(vocab_size - n_low, generator=generator)
    return torch.cat([torch.arange(n_low), others[: n - n_low]])
