"""What leaks at every layer, by one pass of the whole model: to find out where some rows come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sipit.models.prefix_cache import RecordingCache
from sipit.models.sites import SITES
from sipit.observations import Cut, Site

if TYPE_CHECKING:
    from sipit.models.language_model import LanguageModel


def everywhere(
    lm: LanguageModel, input_ids: Tensor, cuts: Sequence[Cut], *, seq_len: int | None = None
) -> Iterator[tuple[Cut, Tensor]]:
    """Yield what leaks at several cuts on prompts of one length. (B, T) → (cut, (B, T, W)), in the order of the cuts.

    Args:
        lm: the model.
        input_ids: (B, T).
        cuts: of any sites; those of a block that caches no keys of its own are passed over.
        seq_len: as in `LanguageModel.cut`.
    """
    plain = _passed(lm, cuts)
    cache = RecordingCache(lm.n_layers)
    key = ("everywhere", get_ident(), lm.regime(seq_len), plain[-1])
    tapped = lm.derived(key, lambda: lm.tapped(plain, seq_len=seq_len))
    states = dict(zip(plain, tapped.states(input_ids, cache), strict=True))
    for cut in cuts:
        spec = SITES[cut.site]
        if spec.ends == "cache":
            cached = cache.keys_and_values(cut.layer)
            if cached is not None:
                yield cut, spec.read(*cached)
        elif spec.ends == "logits":
            yield cut, spec.read(lm.head(states[lm.final_cut]))
        else:
            yield cut, spec.read(states[lm.final_cut if spec.ends == "final" else Cut(cut.layer)])


def _passed(lm: LanguageModel, cuts: Sequence[Cut]) -> list[Cut]:
    """Return the states that a pass goes through to give what leaks at some cuts, and no further."""
    if any(SITES[cut.site].is_behind_all for cut in cuts):
        return [*(Cut(layer) for layer in range(lm.n_layers + 1)), lm.final_cut]
    deepest = max((cut.layer + (SITES[cut.site].ends == "cache") for cut in cuts), default=0)
    return [Cut(layer) for layer in range(deepest + 1)]


@torch.no_grad()
def cuts_of_width(lm: LanguageModel, width: int, sites: Sequence[Site] = tuple(SITES)) -> list[Cut]:
    """Return every cut of some sites whose values are that wide, by rising layer."""
    found = []
    for site in sites:
        spec = SITES[site]
        layers = range(spec.first_layer(lm.n_layers), spec.last_layer(lm.n_layers) + 1)
        middle = Cut(layers[len(layers) // 2], site)
        if spec.ends == "cache":  # blocks may differ in their heads
            recorded = dict(everywhere(lm, torch.zeros(1, 1, dtype=torch.long), [Cut(i, site) for i in layers]))
            found += [cut for cut, values in recorded.items() if values.shape[-1] == width]
        elif lm.width(middle) == width:
            found += [Cut(layer, site) for layer in layers]
    return found


def distinct_cuts(lm: LanguageModel, width: int) -> list[Cut]:
    """Return the cuts as wide as some rows, without those that differ from another one by a scale alone."""
    return [cut for cut in cuts_of_width(lm, width) if not cut.site.endswith("_unit")]
