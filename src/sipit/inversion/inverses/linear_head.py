"""The head as a linear map: logits from states after the final norm.

Only proposals use it: what it estimates proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sipit.models import LanguageModel
from sipit.observations import Site

_SCALED_BY = 4  # logits for each coordinate of the states that the head's scale is measured on


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Logits from states, but for the cap that some families put on them and one constant a row."""

    weight: Tensor  # (V, D), as the model holds it
    scale: float  # families multiply their logits by a constant
    offset: Tensor  # (V,) float64
    cap: float | None  # tanh's, where the values went through it

    def rows(self, token_ids: Tensor) -> Tensor:
        """Return the map's rows for some tokens. (K,) → (K, D) float64."""
        return self.scale * self.weight[token_ids.to(self.weight.device)].detach().cpu().double()

    def spread(self, n: int) -> Tensor:
        """Return n tokens, evenly spread over the vocabulary, or all. (K,)."""
        n_rows = len(self.weight)
        n = min(n_rows, n)
        return torch.arange(n) * n_rows // n

    def uncapped(self, logits: Tensor) -> Tensor:
        """Return logits as they were before the cap, in float64 on the CPU."""
        logits = logits.cpu().double()
        return torch.atanh((logits / self.cap).clamp(-1 + 1e-6, 1 - 1e-6)) * self.cap if self.cap else logits

    def logits(self, state: Tensor) -> Tensor:
        """Return what the head makes of one state, but for the cap. (D,) → (V,) float32 on the CPU."""
        product = self.weight.detach().float() @ state.float().to(self.weight.device)
        return self.scale * product.cpu() + self.offset.float()


def linear_head(lm: LanguageModel, site: Site) -> LinearHead:
    """Return the head of a model as a map to a site behind it, made once."""

    def made() -> LinearHead:
        head: Any = cast(Any, lm.model).get_output_embeddings()
        n_rows, width = head.weight.shape
        bias = getattr(head, "bias", None)
        offset = torch.zeros(n_rows, dtype=torch.float64) if bias is None else bias.detach().cpu().double()
        cap = getattr(cast(Any, lm.model).config, "final_logit_softcapping", None)
        unscaled = LinearHead(weight=head.weight, scale=1.0, offset=offset, cap=cap)
        used = unscaled.spread(_SCALED_BY * width)
        weight = unscaled.rows(used)
        states = lm.capture(input_ids=torch.arange(16) * 7919 % lm.vocab_size, site="final").states
        known = unscaled.uncapped(lm.head(states[None].to(lm.device))[0][:, used.to(lm.device)]) - offset[used]
        image = states.cpu().double() @ (weight - weight.mean(dim=0)).T  # (N, K)
        scale = float((image * (known - known.mean(dim=1, keepdim=True))).sum() / image.square().sum())
        return LinearHead(weight=head.weight, scale=scale, offset=offset, cap=cap if cap and site == "logits" else None)

    return lm.derived(("linear head", site), made)
