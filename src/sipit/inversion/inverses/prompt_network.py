"""The prompt network: from the state of the last token to the tokens before it, the last one first.

At every step it sees the state, by a linear map of its own for each distance from the end and by a small
transformer over the tokens read so far, and gives a query that is matched against every token's key, and the
log-odds that the prompt starts here. With no blocks it is the linear maps alone.

Shapes: B prompts, N tokens read so far, D = width of a state, K = width of a key, V = vocab_size.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sipit.inversion.inverses.arithmetic import fast_arithmetic
from sipit.inversion.inverses.network import KEY_LENGTH, unit_rms
from sipit.inversion.inverses.token_keys import TokenKeys, token_keys
from sipit.models import LanguageModel

_HEADS = 4
_SLICE = 8192  # tokens whose keys are made at once


class PromptNetwork(nn.Module):
    """State of the last token, and the tokens already read → a query for the token before them, and for the end.

    Args:
        d_state: D.
        d_key: K.
        vocab_size: V.
        max_tokens: longest prompt it reads.
        d_hidden: width of the transformer.
        n_blocks: its blocks; 0 for the linear maps alone.
    """

    mean: Tensor  # (D,)
    whitener: Tensor  # (D, D)

    def __init__(
        self, d_state: int, d_key: int, vocab_size: int, *, max_tokens: int, d_hidden: int, n_blocks: int
    ) -> None:
        super().__init__()
        self.max_tokens, self.d_hidden, self.vocab_size = max_tokens, d_hidden, vocab_size
        self.register_buffer("mean", torch.zeros(d_state))
        self.register_buffer("whitener", torch.eye(d_state))
        self.linear = nn.Parameter(torch.zeros(max_tokens + 1, d_state, d_key))
        self.entry = nn.Sequential(nn.Linear(d_state, 2 * d_hidden), nn.GELU(), nn.Linear(2 * d_hidden, d_hidden))
        self.token = nn.Linear(d_key, d_hidden)
        self.start = nn.Parameter(torch.zeros(d_hidden))
        self.place = nn.Parameter(torch.zeros(max_tokens + 1, d_hidden))
        self.blocks = nn.ModuleList(_Block(d_state, d_hidden) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(d_hidden)
        self.out = nn.Linear(d_hidden, d_key)
        self.end = nn.Linear(d_hidden, 1)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    @property
    def n_blocks(self) -> int:
        """Blocks of the transformer."""
        return len(self.blocks)

    def reset(self, generator: torch.Generator) -> None:
        """Draw what must not start equal; what feeds the logits, and all biases, start at zero."""
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    std = parameter.shape[1] ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    layer.bias.zero_()
            self.place.mul_(0.02 * self.d_hidden**0.5)
            self.out.weight.zero_()
            self.end.weight.zero_()

    def white(self, states: Tensor) -> Tensor:
        """Return states at unit root mean square, whitened. (B, D) → (B, D)."""
        return (unit_rms(states) - self.mean) @ self.whitener

    def forward(self, white: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and the log-odds of the end at every step.

        Args:
            white: (B, D) or (1, D), as `white` makes them.
            read: (B, N, K) keys of the tokens read, the last token of the prompt first.

        Returns:
            (B, N + 1, K), (B, N + 1)
        """
        n_steps = read.shape[1] + 1
        tokens = torch.cat([self.start.expand(len(read), 1, -1), self.token(read)], dim=1)
        x = tokens + self.place[:n_steps] + self.entry(white)[:, None]
        for block in self.blocks:
            x = block(x, white)
        x = self.norm(x)
        linear = torch.einsum("bd,ndk->bnk", white, self.linear[:n_steps].to(white.dtype))
        return self.out(x) + linear, self.end(x)[..., 0]


class _Block(nn.Module):
    """One block of a causal transformer whose hidden layer sees the state as well."""

    def __init__(self, d_state: int, d_hidden: int) -> None:
        super().__init__()
        self.norm_in, self.norm_mid = nn.LayerNorm(d_hidden), nn.LayerNorm(d_hidden)
        self.qkv, self.mix = nn.Linear(d_hidden, 3 * d_hidden), nn.Linear(d_hidden, d_hidden)
        self.state = nn.Linear(d_state, d_hidden)
        self.up, self.down = nn.Linear(2 * d_hidden, 4 * d_hidden), nn.Linear(4 * d_hidden, d_hidden)

    def forward(self, x: Tensor, white: Tensor) -> Tensor:
        """(B, N, d_hidden), (B, D) → (B, N, d_hidden)."""
        n_prompts, n_steps, d_hidden = x.shape
        heads = self.qkv(self.norm_in(x)).view(n_prompts, n_steps, 3, _HEADS, d_hidden // _HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, heads, N, d_head) each
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(n_prompts, n_steps, d_hidden))
        state = self.state(white)[:, None].expand(n_prompts, n_steps, -1)
        return cast(Tensor, x + self.down(F.gelu(self.up(torch.cat([self.norm_mid(x), state], dim=2)))))


class PromptReader:
    """A prompt network beside the keys of its model's tokens: what a decoder asks."""

    def __init__(self, lm: LanguageModel, network: PromptNetwork) -> None:
        self.network = network
        self.table = key_table(lm)  # (V, K) bfloat16 or float32

    @torch.no_grad()
    def log_probabilities(self, white: Tensor, read: Tensor) -> Tensor:
        """Return the log-probability of every token, and of the end, at every step.

        Args:
            white: (1, D) of the one state that is read.
            read: (B, N) token ids, the last token of the prompt first.

        Returns:
            (B, N + 1, V + 1) float32; the last column is the end.
        """
        with fast_arithmetic(white.device, torch.float32):
            queries, ends = self.network(white, self.table[read].float())
            logits = (queries.to(self.table.dtype) @ self.table.T).float()
        logits = KEY_LENGTH * logits + self.network.bias
        return torch.cat([logits, ends.float()[..., None]], dim=2).log_softmax(dim=2)

    @torch.no_grad()
    def next_log_probabilities(self, white: Tensor, read: Tensor) -> Tensor:
        """As `log_probabilities`, of the last step alone. (B, N) → (B, V + 1)."""
        with fast_arithmetic(white.device, torch.float32):
            queries, ends = self.network(white, self.table[read].float())
            logits = (queries[:, -1].to(self.table.dtype) @ self.table.T).float()
        logits = KEY_LENGTH * logits + self.network.bias
        return torch.cat([logits, ends[:, -1:].float()], dim=1).log_softmax(dim=1)


def key_table(lm: LanguageModel) -> Tensor:
    """Return the unit keys of all tokens of a model, made once. (V, K) bfloat16."""

    def made() -> Tensor:
        keys: TokenKeys = token_keys(lm)
        return torch.cat([keys.keys(part).bfloat16() for part in torch.arange(lm.vocab_size).split(_SLICE)])

    return lm.derived("key table", made)
