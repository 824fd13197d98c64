"""What leaks at each site: one row a site, and no other place that asks which site it is.

A row says where a pass ends, which layers have the site, and how the values that leak are read from
what the pass ended with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sipit.observations import Site

# block: the residual stream after `layer` blocks; final: that after the final norm; logits: behind the head;
# cache: the keys and values that the block with index `layer` caches, before it attends
End = Literal["block", "final", "logits", "cache"]


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """One site of a causal language model."""

    ends: End  # where the pass ends
    read: Callable[..., Tensor]  # from what it ended with, (…, W) each, to what leaks, (…, W')
    says: str  # what it is, in a few words
    sees_mean: bool = False  # whether a constant added to every coordinate of the residual stream changes it

    def first_layer(self, n_layers: int) -> int:
        """Return the lowest layer that has the site."""
        return n_layers if self.is_behind_all else 0

    def last_layer(self, n_layers: int) -> int:
        """Return the highest layer that has the site."""
        return n_layers - 1 if self.ends == "cache" else n_layers

    @property
    def is_behind_all(self) -> bool:
        """Whether the site lies behind the final norm, so that one layer alone has it."""
        return self.ends in ("final", "logits")

    @property
    def is_plain(self) -> bool:
        """Whether what leaks are the states themselves."""
        return self.read is _itself


def _itself(states: Tensor) -> Tensor:
    return states


def _unit(states: Tensor) -> Tensor:
    return nn.functional.normalize(states.float(), dim=-1).to(states.dtype)


def _centred(states: Tensor) -> Tensor:
    return (states.float() - states.float().mean(dim=-1, keepdim=True)).to(states.dtype)


def _keys(keys: Tensor, values: Tensor) -> Tensor:  # noqa: ARG001  one signature for all sites of a cache
    return keys


def _values(keys: Tensor, values: Tensor) -> Tensor:  # noqa: ARG001
    return values


def _both(keys: Tensor, values: Tensor) -> Tensor:
    return torch.cat([keys, values], dim=-1)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1)


SITES: dict[Site, SiteSpec] = {
    "block": SiteSpec(ends="block", read=_itself, says="residual stream after `layer` blocks", sees_mean=True),
    "final": SiteSpec(ends="final", read=_itself, says="states after the final norm"),
    "kv": SiteSpec(ends="cache", read=_both, says="keys, then values, cached by the block with index `layer`"),
    "keys": SiteSpec(ends="cache", read=_keys, says="keys that block caches, after rotary embedding"),
    "values": SiteSpec(ends="cache", read=_values, says="values that block caches"),
    "logits": SiteSpec(ends="logits", read=_itself, says="logits of the next token"),
    "log_probs": SiteSpec(ends="logits", read=_log_probabilities, says="log-probabilities of the next token"),
    "block_unit": SiteSpec(ends="block", read=_unit, says="block, each row brought to length 1", sees_mean=True),
    "block_centred": SiteSpec(ends="block", read=_centred, says="block, the mean of each row removed"),
    "final_unit": SiteSpec(ends="final", read=_unit, says="final, each row brought to length 1"),
}
