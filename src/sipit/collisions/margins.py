"""One-step margins: how far apart the next tokens of a prefix lie, which bounds the noise an inversion bears.

Inversion stays exact while every observed state is off by less than half the margin (arXiv
2510.15511, theorem 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.collisions.continuations import continued_states
from sipit.collisions.nearest import nearest_pairs
from sipit.collisions.spread import PERCENTILES
from sipit.collisions.states import Cut
from sipit.errors import OptionError
from sipit.models import LanguageModel
from sipit.observations import Site


@dataclass(frozen=True, kw_only=True)
class MarginSurvey:
    """The one-step margins of many prefixes at one layer, over the tokens that were tried behind each."""

    layer: int
    site: Site
    n_prefixes: int
    n_tokens: int  # next tokens tried behind each prefix
    is_whole_vocabulary: bool  # else each margin is an upper bound of the one over all tokens
    least: float  # L2
    mean: float  # L2
    percentiles: tuple[tuple[float, float], ...]  # (per cent, L2)
    median_relative_to_norm: float  # of margin / mean norm of that prefix's states
    least_relative_to_norm: float
    least_prefix: tuple[int, ...]  # token ids of the prefix with the least margin
    least_tokens: tuple[int, int]  # the two next tokens that lie closest there


def survey_margins(
    lm: LanguageModel,
    prefixes: Sequence[Tensor],
    cuts: Sequence[Cut],
    *,
    n_tokens: int | None = 256,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> list[MarginSurvey]:
    """Return the one-step margins at each cut.

    Args:
        lm: the model.
        prefixes: token ids, at least one each. (P,)
        cuts: (layer, site) pairs, of layers 1 to n_layers.
        n_tokens: next tokens drawn at random behind each prefix, without repeats; None: the whole
            vocabulary, which is the margin itself.
        seed: of the draws.
        on_step: told the prefixes done and in all.

    Raises:
        OptionError: no prefix, fewer than two tokens, or a layer below 1.
    """
    if not prefixes or not cuts or any(layer < 1 for layer, _ in cuts):
        raise OptionError("margins need at least one prefix and layers of 1 or more")
    n_drawn = lm.vocab_size if n_tokens is None else min(n_tokens, lm.vocab_size)
    if n_drawn < 2:
        raise OptionError(f"n_tokens is {n_drawn}; a margin lies between at least 2 next tokens")
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(len(cuts), len(prefixes), dtype=torch.float64)
    relative = torch.empty_like(found)
    closest = torch.empty(len(cuts), len(prefixes), 2, dtype=torch.long)
    for number, prefix in enumerate(prefixes):
        tokens = torch.arange(lm.vocab_size)
        if n_drawn < lm.vocab_size:
            tokens = torch.randperm(lm.vocab_size, generator=generator)[:n_drawn]
        for i, states in enumerate(continued_states(lm, prefix, tokens, cuts)):
            pair = nearest_pairs([states])[0]
            norm = torch.linalg.vector_norm(states.double(), dim=1).mean()
            found[i, number] = pair.distance
            relative[i, number] = pair.distance / norm
            closest[i, number] = tokens[[pair.first, pair.second]]
        if on_step is not None:
            on_step(number + 1, len(prefixes))
    return [
        _surveyed(cut, prefixes, n_drawn, n_drawn == lm.vocab_size, found[i], relative[i], closest[i])
        for i, cut in enumerate(cuts)
    ]


def _surveyed(
    cut: Cut,
    prefixes: Sequence[Tensor],
    n_tokens: int,
    is_whole: bool,
    found: Tensor,
    relative: Tensor,
    closest: Tensor,
) -> MarginSurvey:
    least = int(found.argmin())
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    one, two = closest[least].tolist()
    return MarginSurvey(
        layer=cut[0],
        site=cut[1],
        n_prefixes=len(prefixes),
        n_tokens=n_tokens,
        is_whole_vocabulary=is_whole,
        least=float(found[least]),
        mean=float(found.mean()),
        percentiles=tuple(zip(PERCENTILES, found.quantile(shares).tolist(), strict=True)),
        median_relative_to_norm=float(relative.median()),
        least_relative_to_norm=float(relative.min()),
        least_prefix=tuple(prefixes[least].tolist()),
        least_tokens=(one, two),
    )
