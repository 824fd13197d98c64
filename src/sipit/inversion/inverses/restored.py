"""From what leaked at any site to rows that an inverse reads: the states themselves, where they can be restored.

Only proposals see them. Logits are a linear image of the states after the final norm; rows of length 1
are those states but for a length; keys and values are read as they are, position taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.inverses.linear_head import linear_head
from sipit.models import LanguageModel
from sipit.models.unrotated import unrotated_keys
from sipit.observations import Cut, Site

_PER_COORDINATE = 4  # logits used for each coordinate of the state they are an image of


@dataclass(frozen=True, kw_only=True)
class Restored:
    """How the values of one cut are read."""

    cut: Cut  # whose inverse reads the rows
    rows: Callable[[Tensor, Tensor], Tensor]  # values (N, W), their positions (N,) → (N, D)
    are_states: bool  # whether the model can go on from the rows


def restored(lm: LanguageModel, cut: Cut) -> Restored:
    """Return how a cut's values are read, made once."""
    return lm.derived(("restored", cut), lambda: _RESTORED[cut.site](lm, cut))


def _as_they_are(_: LanguageModel, cut: Cut) -> Restored:
    return Restored(cut=cut, rows=lambda values, _: values, are_states=True)


def _centred(_: LanguageModel, cut: Cut) -> Restored:
    return Restored(cut=Cut(cut.layer), rows=lambda values, _: values, are_states=True)


def _lengthened(lm: LanguageModel, cut: Cut) -> Restored:
    """Give rows of length 1 the length that states there have, the first one's and that of the others."""
    plain = Cut(cut.layer, "final" if cut.site == "final_unit" else "block")
    norms = lm.capture(input_ids=torch.arange(16) * 7919 % lm.vocab_size, layer=plain.layer, site=plain.site)
    lengths = norms.states.float().norm(dim=1)
    first, rest = float(lengths[0]), float(lengths[1:].median())

    def rows(values: Tensor, positions: Tensor) -> Tensor:
        length = torch.where(positions == 0, first, rest).to(values)  # (N,)
        return values * length[:, None]

    return Restored(cut=plain, rows=rows, are_states=True)


def _before_the_head(lm: LanguageModel, cut: Cut) -> Restored:
    """Solve for the states after the final norm: a constant added to all logits of a row plays no part."""
    head = linear_head(lm, cut.site)
    used = head.spread(_PER_COORDINATE * head.weight.shape[1])  # (K,)
    weight = head.rows(used)  # (K, D)
    inverse = torch.linalg.pinv(weight - weight.mean(dim=0))  # (D, K)

    def rows(values: Tensor, _: Tensor) -> Tensor:
        logits = head.uncapped(values[:, used.to(values.device)]) - head.offset[used]
        states: Tensor = (logits - logits.mean(dim=1, keepdim=True)) @ inverse.T
        return states.float().to(values.device)

    return Restored(cut=lm.final_cut, rows=rows, are_states=True)


def _cached(lm: LanguageModel, cut: Cut) -> Restored:
    n_keys = {"values": 0, "keys": None, "kv": lm.width(Cut(cut.layer, "keys"))}[cut.site]

    def rows(values: Tensor, positions: Tensor) -> Tensor:
        keys = unrotated_keys(lm, cut.layer, values[:, :n_keys], positions)
        return keys if n_keys is None else torch.cat([keys.to(values.dtype), values[:, n_keys:]], dim=1)

    return Restored(cut=cut, rows=rows if n_keys != 0 else lambda values, _: values, are_states=False)


_RESTORED: dict[Site, Callable[[LanguageModel, Cut], Restored]] = {
    "block": _as_they_are,
    "final": _as_they_are,
    "kv": _cached,
    "keys": _cached,
    "values": _cached,
    "logits": _before_the_head,
    "log_probs": _before_the_head,
    "block_unit": _lengthened,
    "block_centred": _centred,
    "final_unit": _lengthened,
}
