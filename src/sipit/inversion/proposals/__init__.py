"""Orders in which to try the vocabulary at a position. A proposal proves nothing: the check decides."""

from __future__ import annotations

from typing import Literal, get_args

from sipit.errors import OptionError
from sipit.inversion.proposals.anchors import anchor_inverse
from sipit.inversion.proposals.gradient import Gradient
from sipit.inversion.proposals.likely import Likely
from sipit.inversion.proposals.proposal import Proposal, Scene
from sipit.inversion.proposals.reader import Reader
from sipit.inversion.proposals.vocabulary import RandomOrder, VocabularyOrder

Policy = Literal["auto", "likely", "gradient", "random", "vocabulary"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

__all__ = ["POLICIES", "Policy", "Proposal", "Scene", "proposal_for"]


def proposal_for(policy: str, scene: Scene) -> Proposal:
    """Return the proposal that a policy names.

    Raises:
        OptionError: no such policy.
    """
    if policy == "auto":
        seen = scene.seen
        return Reader(scene, anchor_inverse(scene.lm, seen.layer, seen.site, scene.meter), is_cautious=False)
    if policy == "likely":
        return Likely(scene)
    if policy == "gradient":
        return Gradient(scene)
    if policy == "random":
        return RandomOrder(scene)
    if policy == "vocabulary":
        return VocabularyOrder(scene)
    raise OptionError(f"policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
