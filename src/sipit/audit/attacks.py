"""What an attacker makes of defended rows, who knows the defence but not its draw nor its key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sipit.audit.defences import Defended
from sipit.inversion import PositionEvidence, invert
from sipit.inversion.judging.meter import Meter
from sipit.inversion.noise.decode import decode, evidence_of, verdict_of
from sipit.inversion.secrets import Relation, follow
from sipit.models import LanguageModel
from sipit.observations import Cut


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    verdict: str
    input_ids: tuple[int, ...]  # fewer than the prompt's where the search ended early
    evidence: tuple[PositionEvidence, ...] = ()  # empty where the way taken has none token by token

    def shown(self, lm: LanguageModel, truth: Sequence[int] | None) -> tuple[dict[str, Any], ...]:
        """Return the answer token by token, as a trial keeps it."""
        said = self.evidence or [None] * len(self.input_ids)
        return tuple(
            {
                "token": lm.decode([token_id]),
                "is_right": truth is None or token_id == truth[place],
                "distance": None if one is None else one.distance,
                "runner_up": None if one is None else one.runner_up,
                "posterior": None if one is None else one.posterior,
            }
            for place, (token_id, one) in enumerate(zip(self.input_ids, said, strict=True))
        )


def attack(lm: LanguageModel, defended: Defended, n_tokens: int, *, pass_dtype: str | None = None) -> Answer:
    """Return what the attack that suits a defence finds.

    Args:
        lm: the model.
        defended: the rows, and what the attacker assumes of them.
        n_tokens: of the prompt.
        pass_dtype: of the pass that left the rows, where it is not the model's.
    """
    seen = defended.seen
    if defended.relation is not None:
        return _followed(lm, seen.cut, defended.relation, n_tokens)
    if defended.noise is not None:
        decoded = decode(lm, seen, defended.noise)
        ids = tuple(decoded.input_ids.tolist())
        evidence = tuple(evidence_of(lm, seen, decoded))
        return Answer(verdict=str(verdict_of(decoded)[0]), input_ids=ids, evidence=evidence)
    found = invert(
        lm,
        seen,
        is_shuffled=defended.is_shuffled,
        is_permuted=defended.is_permuted,
        pass_dtype=pass_dtype,
    )
    ids = found.input_ids[: len(found.positions)]
    return Answer(verdict=str(found.verdict), input_ids=ids, evidence=found.positions)


def _followed(lm: LanguageModel, cut: Cut, relation: Relation, n_tokens: int) -> Answer:
    found = follow(lm, cut, relation, n_tokens, Meter())
    if not found.prompts:
        return Answer(verdict="unmatched", input_ids=())
    return Answer(verdict="recovered" if len(found.prompts) == 1 else "ambiguous", input_ids=found.prompts[0])
