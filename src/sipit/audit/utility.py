"""What a defence costs: how the model goes on from the defended rows, against how it goes on from the true ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sipit.float64 import as_float64
from sipit.models import LanguageModel
from sipit.observations import Observation

_GOES_ON = ("block", "final")  # sites whose rows the rest of the model can be run on


@dataclass(frozen=True, kw_only=True)
class Utility:
    """How much of the model's own answers is left."""

    kl: float  # nats a token: of the next-token probabilities from the defended rows, against those from the true ones
    agreement: float  # share of positions at which the most likely next token is the same


def utility_of(lm: LanguageModel, true: Observation, defended: Observation) -> Utility | None:
    """Return what is left of the model's answers; None at a site that it cannot go on from."""
    if true.site not in _GOES_ON or true.layer == 0:
        return None
    logs = []
    for seen in (true, defended):
        finals, _ = lm.final_states(seen.states, seen.layer, seen.site)
        logs.append(as_float64(lm.next_token_logits(finals)).log_softmax(dim=1))
    before, after = logs  # (T, V)
    kl = (before.exp() * (before - after)).sum(dim=1).mean()
    same = (before.argmax(dim=1) == after.argmax(dim=1)).double().mean()
    return Utility(kl=float(torch.clamp(kl, min=0)), agreement=float(same))
