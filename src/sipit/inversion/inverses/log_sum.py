"""Sums of exponentials that stay fast where scores are peaked."""

from __future__ import annotations

from torch import Tensor

_LEAST = -80.0  # nats below the largest, from which on exponentials are denormal numbers: twenty times as slow to add


def log_sum_exp(logits: Tensor) -> Tensor:
    """Return the logarithm of the sum of the exponentials of each row, as `torch.logsumexp`. (…, V) → (…)."""
    largest = logits.amax(dim=-1, keepdim=True).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return (logits - largest).clamp_(min=_LEAST).exp_().sum(dim=-1).log_().add_(largest[..., 0])
