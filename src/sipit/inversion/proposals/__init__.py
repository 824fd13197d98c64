"""Orders in which to try the vocabulary at a position. A proposal proves nothing: the check decides."""

from __future__ import annotations

from sipit.errors import OptionError
from sipit.inversion.evidence.result import POLICIES, Policy
from sipit.inversion.inverses.fitted_inverse import FittedInverse
from sipit.inversion.inverses.restored import restored
from sipit.inversion.inverses.ridge_inverse import ridge_inverse
from sipit.inversion.inverses.store import load_fit
from sipit.inversion.inverses.token_keys import token_keys
from sipit.inversion.proposals.fused import FusedProposal
from sipit.inversion.proposals.gradient import Gradient
from sipit.inversion.proposals.hinted import Hinted
from sipit.inversion.proposals.likely import Likely
from sipit.inversion.proposals.price import likelihood_pays
from sipit.inversion.proposals.proposal import Proposal, SearchView
from sipit.inversion.proposals.vocabulary import RandomOrder, VocabularyOrder

__all__ = ["POLICIES", "Hinted", "Policy", "Proposal", "SearchView", "proposal_for"]


def proposal_for(policy: str, view: SearchView, *, use_fit: bool = True) -> Proposal:
    """Return the proposal that a policy names.

    Args:
        policy: one of POLICIES.
        view: where the search stands.
        use_fit: whether "auto" may use a fitted inverse that is there.

    Raises:
        OptionError: no such policy.
    """
    if policy == "auto":
        return _best_inverse(view, use_fit)
    if policy == "likely":
        return Likely(view)
    if policy == "gradient":
        return Gradient(view)
    if policy == "random":
        return RandomOrder(view)
    if policy == "vocabulary":
        return VocabularyOrder(view)
    raise OptionError(f"policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}")


def _best_inverse(view: SearchView, use_fit: bool) -> FusedProposal:
    """Read by a fitted inverse if there is one, else by anchors."""
    lm, layer = view.lm, view.seen.layer
    cut = restored(lm, view.seen.cut).cut
    fit = load_fit(lm, cut) if use_fit else None
    if fit is None:
        return FusedProposal(view, ridge_inverse(lm, cut, view.meter), is_cautious=False)
    is_dear = not likelihood_pays(layer, lm.n_layers - layer, view.seen.seq_len)
    return FusedProposal(view, FittedInverse(token_keys(lm), fit), is_cautious=is_dear)
