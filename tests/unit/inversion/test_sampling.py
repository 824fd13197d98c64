"""Tokens are drawn by their probability, at vocabularies of any size."""

from __future__ import annotations

import pytest
import torch

from sipit.inversion.fitting.sampling import _drawn

_N = 200_000


@pytest.mark.parametrize("vocab_size", [5, 128, 300])
def test_tokens_come_up_as_often_as_is_likely(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 2 * torch.randn(1, vocab_size, generator=generator)
    expected = logits.softmax(dim=1)[0] * _N
    counts = torch.bincount(_drawn(logits.expand(_N, -1), generator)[:, 0], minlength=vocab_size)
    chi_squared = float(((counts - expected).square() / expected).sum())
    assert chi_squared < vocab_size + 5 * (2 * vocab_size) ** 0.5


@pytest.mark.parametrize("token_id", [0, 127, 128, 299])
def test_a_certain_token_is_always_drawn(token_id: int) -> None:
    logits = torch.full((50, 300), -1e4)
    logits[:, token_id] = 0.0
    assert (_drawn(logits, torch.Generator().manual_seed(0)) == token_id).all()
