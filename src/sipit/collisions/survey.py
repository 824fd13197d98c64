"""Survey of captured states: at every layer the closest pairs, exactly, and how they compare with the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.collisions.farthest import farthest_pair
from sipit.collisions.nearest import MEMORY, OnStep, search_pairs
from sipit.collisions.scales import THRESHOLD, ScaledPair, scaled_pairs
from sipit.collisions.spread import Spread, full_spread, sampled_spread
from sipit.collisions.store import StateFolder
from sipit.errors import OptionError
from sipit.observations import Cut, Site


@dataclass(frozen=True, kw_only=True)
class LengthSurvey:
    """The closest pair among prompts of one length."""

    length: int  # tokens
    n_prompts: int
    least: float  # L2, exact
    median: float  # L2, of a sample of pairs


@dataclass(frozen=True, kw_only=True)
class LayerSurvey:
    """What the states at one layer say."""

    layer: int
    site: Site
    n_prompts: int
    n_pairs: int  # all of them are covered
    threshold: float  # L2
    n_equal: int  # pairs equal in every value
    n_collisions: int  # pairs at distance <= threshold, equal ones included
    closest: tuple[ScaledPair, ...]
    closest_varied: tuple[ScaledPair, ...]  # with one prompt left of those that repeat one and the same token
    farthest: float | None  # L2, exact; None where it was not asked for
    spread: Spread
    median_norm: float  # L2 norm of a state
    by_length: tuple[LengthSurvey, ...]
    n_projected: int  # pairs whose projections were compared
    n_multiplied: int  # pairs whose whole rows were multiplied
    n_decided: int  # pairs whose float64 distance was computed
    seconds: float


def survey_layers(
    folder: StateFolder,
    *,
    cuts: Sequence[Cut] | None = None,
    k: int = 10,
    threshold: float = THRESHOLD,
    memory: int = MEMORY,
    is_full: bool = False,
    on_step: OnStep | None = None,
) -> Iterator[LayerSurvey]:
    """Yield the survey of each captured layer, as it is done.

    Args:
        folder: captured states.
        cuts: (layer, site) pairs; all that were captured where None.
        k: closest pairs to report.
        threshold: L2 distance at or below which a pair counts as a collision.
        memory: bytes a search may use, about.
        is_full: compute the distribution over all pairs and the farthest pair, not over a sample.
        on_step: told the pairs covered at a layer, and in all.
    """
    if len(folder) < 2:
        raise OptionError(f"{folder.path} holds {len(folder)} prompt; a survey compares at least two")
    lengths, is_varied = folder.lengths(), varied(folder)
    for cut in folder.cuts if cuts is None else cuts:
        yield _surveyed(
            folder.blocks(cut),
            lengths,
            is_varied,
            cut=cut,
            k=k,
            threshold=threshold,
            memory=memory,
            is_full=is_full,
            on_step=on_step,
        )


def _surveyed(
    blocks: list[Tensor],
    lengths: Tensor,
    is_varied: Tensor,
    *,
    cut: Cut,
    k: int,
    threshold: float,
    memory: int,
    is_full: bool,
    on_step: OnStep | None,
) -> LayerSurvey:
    started = time.perf_counter()
    found = search_pairs(blocks, k=k, within=threshold, memory=memory, on_step=on_step)
    farthest = farthest_pair(blocks, memory=memory).distance if is_full else None
    spread = sampled_spread(blocks) if farthest is None else full_spread(blocks, farthest=farthest)
    rest = found
    if not bool(is_varied.all()):
        rest = search_pairs(_chosen(blocks, is_varied), k=k, memory=memory)
        numbers = is_varied.nonzero()[:, 0].tolist()
        pairs = (replace(p, first=numbers[p.first], second=numbers[p.second]) for p in rest.pairs)
        rest = replace(rest, pairs=tuple(pairs))
    norms = torch.cat([torch.linalg.vector_norm(block.double(), dim=1).cpu() for block in blocks])
    return LayerSurvey(
        layer=cut[0],
        site=cut[1],
        n_prompts=found.n_rows,
        n_pairs=found.n_covered,
        threshold=threshold,
        n_equal=found.n_equal,
        n_collisions=found.n_collisions,
        closest=scaled_pairs(found.pairs, norms, spread.median),
        closest_varied=scaled_pairs(rest.pairs, norms, spread.median),
        farthest=farthest,
        spread=spread,
        median_norm=float(norms.median()),
        by_length=tuple(_by_length(blocks, lengths, memory)),
        n_projected=found.n_projected,
        n_multiplied=found.n_multiplied,
        n_decided=found.n_decided,
        seconds=time.perf_counter() - started,
    )


def closest_prompts(folder: StateFolder, cut: Cut, *, n: int, memory: int = MEMORY) -> list[Tensor]:
    """Return n different prompts out of the closest pairs at a layer, the closest pair's first. (T,) each.

    Of prompts that repeat one and the same token, one takes part; see `varied`.
    """
    k = n
    while True:
        pairs = _closest(folder, cut, k, memory)
        found = list(dict.fromkeys(number for pair in pairs for number in pair))
        if len(found) >= n or len(pairs) < k:
            return [folder.prompt(number) for number in found[:n]]
        k *= 2


def closest_pairs(folder: StateFolder, cut: Cut, *, n: int, memory: int = MEMORY) -> list[tuple[Tensor, Tensor]]:
    """Return the two prompts of each of the n closest pairs at a layer, of prompts as in `closest_prompts`."""
    return [(folder.prompt(one), folder.prompt(two)) for one, two in _closest(folder, cut, n, memory)]


def _closest(folder: StateFolder, cut: Cut, k: int, memory: int) -> list[tuple[int, int]]:
    """Return the numbers of the prompts of the k closest pairs, or of all pairs if there are fewer."""
    is_varied = varied(folder)
    numbers = is_varied.nonzero()[:, 0].tolist()
    pairs = search_pairs(_chosen(folder.blocks(cut), is_varied), k=k, memory=memory).pairs
    return [(numbers[pair.first], numbers[pair.second]) for pair in pairs]


def _by_length(blocks: list[Tensor], lengths: Tensor, memory: int) -> Iterator[LengthSurvey]:
    """Yield the closest pair among prompts of each length that two or more have."""
    for length in lengths.unique().tolist():
        parts = _chosen(blocks, lengths == length)
        n_prompts = sum(len(part) for part in parts)
        if n_prompts > 1:
            yield LengthSurvey(
                length=length,
                n_prompts=n_prompts,
                least=search_pairs(parts, memory=memory).pairs[0].distance,
                median=sampled_spread(parts, n_pairs=20_000).median,
            )


def varied(folder: StateFolder) -> Tensor:
    """Return which prompts to keep so that no two repeat one and the same token. (N,) bool.

    Where rotary positions and nothing else tell positions apart, such prompts have equal states in
    exact arithmetic: attention averages equal values. Their distances are rounding.
    """
    keep = torch.ones(len(folder), dtype=torch.bool)
    known: set[int] = set()
    for number, ids in enumerate(folder.prompts()):
        if bool((ids == ids[0]).all()):
            keep[number] = int(ids[0]) not in known
            known.add(int(ids[0]))
    return keep


def _chosen(blocks: list[Tensor], is_chosen: Tensor) -> list[Tensor]:
    """Return the chosen rows of each block."""
    parts = is_chosen.split([len(block) for block in blocks])
    return [block[part.to(block.device)] for block, part in zip(blocks, parts, strict=True)]
