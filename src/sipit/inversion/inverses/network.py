"""The fitted inverse: a small network from the states around a position to a query.

The query is matched against every token's key (the whitened embedding rows), so no table of the
vocabulary is learned but one bias a token. States are brought to unit root mean square first, which
tames the extreme norms some positions have.

Shapes: T positions, B batch, D = width of a state, K = width of a key, V = vocab_size.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sipit.inversion.inverses.arithmetic import fast_arithmetic

_N_SEEN = 3  # states the network attends: the one before, this one, the one after
KEY_LENGTH = 8.0  # common length of all keys: with longer ones the softmax is sure of everything


class InverseNetwork(nn.Module):
    """States around a position → query. (T, D) → (T, K); the score of token v is query · key_v + bias_v."""

    mean: Tensor  # (D,)
    whitener: Tensor  # (D, D)

    def __init__(self, d_state: int, d_key: int, vocab_size: int, d_hidden: int) -> None:
        super().__init__()
        n_inputs = _N_SEEN * d_state
        self.register_buffer("mean", torch.zeros(d_state))
        self.register_buffer("whitener", torch.eye(d_state))
        self.linear = nn.Linear(n_inputs, d_key)
        self.up = nn.Linear(n_inputs, d_hidden)
        self.down = nn.Linear(d_hidden, d_key, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def reset(self, generator: torch.Generator) -> None:
        """Draw the hidden layer; everything else starts at zero."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            std = self.up.in_features**-0.5
            self.up.weight.copy_(torch.randn(self.up.weight.shape, generator=generator) * std)

    def white(self, states: Tensor) -> Tensor:
        """Return states at unit root mean square, whitened. (N, D) → (N, D)."""
        return (unit_rms(states) - self.mean) @ self.whitener

    def forward(self, x: Tensor) -> Tensor:
        """Return queries from gathered inputs. (B, 3 D) → (B, K)."""
        return cast(Tensor, self.linear(x) + self.down(F.gelu(self.up(x))))

    @torch.no_grad()
    def queries(self, states: Tensor) -> Tensor:
        """Return the query at every position of one prompt. (T, D) → (T, K)."""
        white = self.white(states)
        places = torch.arange(len(states), device=states.device)
        return self._fast(beside(white.roll(1, 0), white, white.roll(-1, 0), places, len(states)))

    @torch.no_grad()
    def queries_at(self, states: Tensor, positions: Tensor, others: Tensor) -> Tensor:
        """Return queries were the state at some positions another one. (T, D), (N,), (N, D) → (N, K)."""
        positions = positions.to(states.device)
        around = torch.stack([(positions - 1).clamp(min=0), (positions + 1).clamp(max=len(states) - 1)])  # (2, N)
        places, inverse = around.unique(return_inverse=True)
        before, after = self.white(states[places])[inverse]
        return self._fast(beside(before, self.white(others), after, positions, len(states)))

    def _fast(self, x: Tensor) -> Tensor:
        """As `forward`, in bfloat16 where that is fast, as in training."""
        with fast_arithmetic(x.device, torch.float32):
            return cast(Tensor, self(x)).float()


def beside(before: Tensor, here: Tensor, after: Tensor, places: Tensor, length: int) -> Tensor:
    """Return states next to their neighbours, zero where there is none worth having. (B, D) each → (B, 3 D).

    The state at position 0 is left out before position 1: it is extreme, and seen too rarely to learn from.
    """
    has_before = (places >= 2)[:, None].to(here)
    has_after = (places < length - 1)[:, None].to(here)
    return torch.cat([before * has_before, here, after * has_after], dim=1)


def unit_rms(states: Tensor) -> Tensor:
    """Divide each state by its root mean square. (…, D) → (…, D) float32."""
    states = states.float()
    return states / states.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)


def compact(states: Tensor) -> Tensor:
    """Return states as a fit keeps them: at unit root mean square, float16, in main memory. (…, D) → (…, D)."""
    return unit_rms(states).half().cpu()
