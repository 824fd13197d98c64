"""Follow a prompt token by token through what its rows still say, in the order of the model's own probabilities.

Where several tokens of one pass agree with the rows so far, each is followed; the rows behind them settle it. Nothing
here proves more than the relation does: what is left at the end agrees, and how well; what was not tried may agree too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.judging.meter import Meter
from sipit.inversion.noise.prefixes import BeamPrefixes
from sipit.inversion.noise.prior import TokenPrior
from sipit.inversion.noise.token_map import first_rows_of_all
from sipit.inversion.secrets.relations import Relation
from sipit.models import LanguageModel
from sipit.observations import Cut

_PREFIXES = 64  # followed at once, at most
_BATCH = 256  # tokens in one packed pass


@dataclass(frozen=True, kw_only=True)
class Followed:
    """The prompts found that agree with all rows, the best first; none where no token does at some position."""

    prompts: tuple[tuple[int, ...], ...]
    position: int  # where the search ended: the number of tokens, or the first one that no token agrees at
    excess: float  # the largest of the best prompt, over what arithmetic explains; infinite where there is none


def follow(lm: LanguageModel, cut: Cut, relation: Relation, n_tokens: int, meter: Meter) -> Followed:
    """Return the prompts of so many tokens whose states agree with a relation.

    Args:
        lm: the model.
        cut: where its states were taken.
        relation: what the rows say.
        n_tokens: of the prompt.
        meter: charged for every token run.
    """
    none = torch.empty(0, dtype=torch.long)
    prefixes = BeamPrefixes(lm.cut(cut, seq_len=n_tokens), none, max_batch=_BATCH)
    prior = TokenPrior(lm, none, meter, max_batch=_BATCH, seq_len=n_tokens)
    tokens = torch.empty(1, 0, dtype=torch.long)  # (B, t)
    worst = torch.zeros(1, dtype=torch.float64)  # (B,)
    accepted = torch.empty(1, 0, lm.width(cut), dtype=torch.float64)  # (B, t, W)
    logs = torch.zeros(1)  # (B,) of each prompt so far
    for place in range(n_tokens):
        ahead = logs[:, None] + prior.probabilities.log().cpu()  # (B, V)
        found = _agreeing(relation, prefixes, ahead, accepted, meter) if place else _first(lm, cut, relation, meter)
        ids, beams, excess = found
        if not len(ids):
            return Followed(prompts=(), position=place, excess=float("inf"))
        best = torch.maximum(worst[beams], excess).argsort()[:_PREFIXES]
        ids, beams, excess = ids[best], beams[best], excess[best]
        states = prefixes.grow(ids, beams).cpu().double()
        tokens = torch.cat([tokens[beams], ids[:, None]], dim=1)
        worst = torch.maximum(worst[beams], excess)
        logs = ahead[beams, ids]
        accepted = torch.cat([accepted[beams], states[:, None]], dim=1)
        meter.spend(len(ids), cut.layer)
        if place + 1 < n_tokens:
            prior.grow(ids, beams)
    order = worst.argsort()
    return Followed(
        prompts=tuple(tuple(ids) for ids in tokens[order].tolist()), position=n_tokens, excess=float(worst[order[0]])
    )


_Found = tuple[Tensor, Tensor, Tensor]  # token ids, the beams they are behind, their excess: (N,) each


def _first(lm: LanguageModel, cut: Cut, relation: Relation, meter: Meter) -> _Found:
    """Return the tokens that agree as a prompt's first one."""
    states = first_rows_of_all(lm, cut, meter).cpu().double()  # (V, W)
    excess = relation.excess(states, states[:0])
    ids = (excess <= 1).nonzero()[:, 0]
    return ids, torch.zeros_like(ids), excess[ids]


def _agreeing(relation: Relation, prefixes: BeamPrefixes, ahead: Tensor, accepted: Tensor, meter: Meter) -> _Found:
    """Return tokens that agree behind any prefix: the likeliest first, until a pass finds some. (B, V), (B, t, W)."""
    for places in ahead.flatten().argsort(descending=True).split(_BATCH):
        beams, ids = places // ahead.shape[1], places % ahead.shape[1]
        states = prefixes.states(ids, beams).cpu().double()
        meter.spend(len(ids), prefixes.layer)
        meter.n_checked += len(ids)
        excess = torch.ones(len(ids), dtype=torch.float64)
        for beam in beams.unique().tolist():
            own = beams == beam
            excess[own] = relation.excess(states[own], accepted[beam])
        agrees = excess <= 1
        if agrees.any():
            return ids[agrees], beams[agrees], excess[agrees]
    none = torch.empty(0, dtype=torch.long)
    return none, none, none.double()
