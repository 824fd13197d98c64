"""The head as a linear map: logits from states after the final norm, and those that are not held from those that are.

Only proposals use it: what it estimates proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.inversion.inverses.sampled_ids import spread_ids
from sipit.models import LanguageModel
from sipit.observations import Observation, Site

_SCALED_BY = 4  # logits for each coordinate of the states that the head's scale is measured on
_ANCHORS = (12, 128)  # prompts of random tokens, and their length, that tell how states lie
_USED = 4  # held values for each coordinate of a state, at most
_RIDGE = 1e-8


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


def completed(lm: LanguageModel, seen: Observation, values: Tensor) -> Tensor:
    """Return values with those that are not held estimated from the others: (T, W) → (T, W).

    The state is the likeliest one, as states of random tokens lie, that gives the logits which are held.

    Raises:
        OptionError: values are missing of a site that is not behind the head.
    """
    if not seen.is_partial or seen.half_step is None:
        return values
    if seen.site not in ("logits", "log_probs"):
        raise OptionError(f"values are missing of site {seen.site!r}; only logits and log_probs may be held in part")
    head, (mean, spread) = linear_head(lm, seen.site), _how_states_lie(lm)
    whole = values.clone()
    for row, held in enumerate(seen.half_step.isfinite().cpu()):
        tokens = held.nonzero()[:, 0]
        used = tokens[: _USED * len(mean)]
        weight = head.rows(used)  # (K, D)
        centre = weight.mean(dim=0)
        logits = head.uncapped(values[row][used.to(values.device)]) - head.offset[used]  # (K,)
        left = logits - logits.mean() - (weight - centre) @ mean
        state = mean + _likeliest(weight - centre, left, spread)
        estimate = head.logits(state) + float((logits - weight @ state).mean())  # (V,)
        if head.cap:
            estimate = torch.tanh(estimate / head.cap) * head.cap
        missing = (~held).nonzero()[:, 0]
        whole[row, missing.to(whole.device)] = estimate[missing].to(whole)
    return whole


def _likeliest(map_: Tensor, values: Tensor, spread: Tensor) -> Tensor:
    """Return the likeliest x of covariance S where A x is known but for little. (K, D), (K,), (D, D) → (D,)."""
    if len(map_) <= len(spread):
        gram = map_ @ spread @ map_.T  # (K, K)
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        found: Tensor = spread @ map_.T @ torch.linalg.solve(gram, values)
        return found
    normal = map_.T @ map_  # (D, D)
    normal += _RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype)
    solved: Tensor = torch.linalg.solve(normal, map_.T @ values)
    return solved


def _how_states_lie(lm: LanguageModel) -> tuple[Tensor, Tensor]:
    """Return the mean and the covariance of states after the final norm. (D,), (D, D) float64."""

    def made() -> tuple[Tensor, Tensor]:
        n_prompts, wanted = _ANCHORS
        length = min(wanted, lm.max_positions or wanted)
        ids = spread_ids(lm.vocab_size, n_prompts * length, torch.Generator().manual_seed(3)).view(n_prompts, length)
        model = lm.cut(lm.final_cut)
        states = torch.cat([model.ordinary_batch(row[None])[0, 1:] for row in ids]).cpu().double()
        spread = torch.cov(states.T)
        return states.mean(dim=0), spread + 1e-6 * spread.diagonal().mean() * torch.eye(len(spread)).double()

    return lm.derived(("how final states lie",), made)
