"""Orders in which to try the vocabulary at a position. A proposal proves nothing: the check decides."""

from __future__ import annotations

from sipit.errors import OptionError
from sipit.inversion.fitting import FittedScores, load_fit
from sipit.inversion.proposals.anchors import anchor_inverse
from sipit.inversion.proposals.gradient import Gradient
from sipit.inversion.proposals.hinted import Hinted
from sipit.inversion.proposals.likely import Likely
from sipit.inversion.proposals.proposal import Proposal, Scene
from sipit.inversion.proposals.reader import Reader
from sipit.inversion.proposals.vocabulary import RandomOrder, VocabularyOrder
from sipit.inversion.result import POLICIES, Policy
from sipit.inversion.token_keys import token_keys
from sipit.inversion.tree import LONG

_CHEAP_LIKELIHOOD = 0.25  # blocks above the layer, over blocks below it, that a good inverse still pays for

__all__ = ["POLICIES", "Hinted", "Policy", "Proposal", "Scene", "proposal_for"]


def proposal_for(policy: str, scene: Scene, *, use_fit: bool = True) -> Proposal:
    """Return the proposal that a policy names.

    Args:
        policy: one of POLICIES.
        scene: where the search stands.
        use_fit: whether "auto" may use a fitted inverse that is there.

    Raises:
        OptionError: no such policy.
    """
    if policy == "auto":
        return _best_reader(scene, use_fit)
    if policy == "likely":
        return Likely(scene)
    if policy == "gradient":
        return Gradient(scene)
    if policy == "random":
        return RandomOrder(scene)
    if policy == "vocabulary":
        return VocabularyOrder(scene)
    raise OptionError(f"policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}")


def _best_reader(scene: Scene, use_fit: bool) -> Reader:
    """Read by a fitted inverse if there is one, else by anchors."""
    lm, layer, site = scene.lm, scene.seen.layer, scene.seen.site
    fit = load_fit(lm, layer, site) if use_fit else None
    if fit is None:
        return Reader(scene, anchor_inverse(lm, layer, site, scene.meter), is_cautious=False)
    is_long = scene.seen.seq_len >= LONG  # the likelihood saves more time in passes than its blocks take
    is_dear = lm.n_layers - layer > _CHEAP_LIKELIHOOD * layer and not is_long
    return Reader(scene, FittedScores(token_keys(lm), fit), is_cautious=is_dear)
