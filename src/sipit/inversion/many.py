"""Many observations of one model: searches that share their passes, and a fitted inverse where so many pay for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sipit.inversion.fitting import Cut, fit_inverse, fit_path
from sipit.inversion.fitting.fit import OnFitProgress
from sipit.inversion.result import Inversion
from sipit.inversion.search import search_together
from sipit.models import LanguageModel
from sipit.observations import Observation

N_LANES = 8  # prompts that share their packed passes
FIT_PAYS_AFTER = 20_000  # observed tokens of one layer and site; see "when a fit pays" in the README


def invert_many(
    lm: LanguageModel,
    observations: Sequence[Observation],
    *,
    use_fit: bool = True,
    on_fit: Callable[[Cut, int], None] | None = None,
    on_fit_progress: OnFitProgress | None = None,
    **options: Any,
) -> Iterator[Inversion]:
    """Yield the inversion of each observation, in their order, as it is done.

    Where the observations of one layer and site hold enough tokens to pay for it, and policy "auto"
    has no fitted inverse for it yet, one is made first.

    Args:
        lm: the model the states come from.
        observations: of any layers and sites.
        use_fit: whether a fitted inverse may be used, and made.
        on_fit: told the (layer, site) and the number of tokens before a fit is made.
        on_fit_progress: told where that fit stands.
        options: as for `sipit.invert`.
    """
    if use_fit and options.get("policy", "auto") == "auto":
        for cut in worth_fitting(lm, observations):
            if on_fit is not None:
                on_fit(cut, sum(o.seq_len for o in observations if (o.layer, o.site) == cut))
            fit_inverse(lm, [cut], on_progress=on_fit_progress)
    n_lanes = N_LANES if options.get("policy", "auto") == "auto" else 1
    yield from search_together(lm, observations, n_lanes=n_lanes, use_fit=use_fit, **options)


def worth_fitting(lm: LanguageModel, observations: Sequence[Observation]) -> list[Cut]:
    """Return the cuts whose observations pay for a fitted inverse that is not there yet."""
    tokens: Counter[Cut] = Counter()
    for seen in observations:
        tokens[(seen.layer, seen.site)] += seen.seq_len
    return [
        cut
        for cut, count in tokens.items()
        if count >= FIT_PAYS_AFTER and cut[0] > 0 and not fit_path(lm, *cut).is_file()
    ]
