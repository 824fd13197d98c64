"""Every next token behind some prefixes: the closest states within a prefix and across prefixes, exactly.

States come from packed passes behind the kept prefix; the closest pairs are computed again by
ordinary forward passes, and both distances are reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sipit.collisions.equal import equal_groups, n_equal_pairs
from sipit.collisions.nearest import MEMORY, OnStep, PairSearch, search_between, search_pairs
from sipit.collisions.rows import Rows
from sipit.collisions.scales import THRESHOLD
from sipit.collisions.spread import Spread, sampled_spread
from sipit.collisions.states import finite_states, last_states
from sipit.collisions.store import StateFolder, StateWriter, prompts_sha256
from sipit.errors import OptionError
from sipit.models import LanguageModel
from sipit.models.quantized import rounds_activations
from sipit.observations import Cut, Site

_ROWS = 8192  # embedding rows compared at a time
_BATCH = 256  # continuations in one packed pass


@dataclass(frozen=True, kw_only=True)
class ContinuedPair:
    """Two continued prompts whose states lie close."""

    first: tuple[int, ...]  # token ids
    second: tuple[int, ...]
    distance: float  # L2 of the states from packed passes, decided by float64 differences
    ordinary_distance: float  # L2 of the states from one ordinary forward pass each
    relative_to_norm: float  # distance over the mean norm of the two states


@dataclass(frozen=True, kw_only=True)
class PairSummary:
    """One kind of pairs at one layer."""

    n_pairs: int  # all of them are covered
    n_equal: int  # pairs equal in every value
    n_collisions: int  # pairs at distance <= threshold, equal ones included
    n_multiplied: int  # pairs whose whole rows were multiplied
    n_decided: int  # pairs whose float64 distance was computed
    closest: ContinuedPair | None  # None where there are no pairs


@dataclass(frozen=True, kw_only=True)
class ContinuationSurvey:
    """The states behind every next token of some prefixes, at one layer."""

    layer: int
    site: Site
    n_prefixes: int
    n_tokens: int  # next tokens tried behind each
    n_equal_rows: int  # pairs of next tokens with equal embedding rows: equal states behind any prefix
    threshold: float  # L2
    within: PairSummary  # both behind one prefix
    across: PairSummary  # behind two different ones
    least_by_prefix: tuple[float, ...]  # L2, closest pair within each: half of it is the noise SIPIT bears there
    spread: Spread  # of pairs drawn within and across, as they come
    seconds: float


def capture_continuations(
    lm: LanguageModel,
    prefixes: Sequence[Tensor],
    cuts: Sequence[Cut],
    folder: Path | str,
    *,
    token_ids: Tensor | None = None,
    batch: int = _BATCH,
    on_step: OnStep | None = None,
) -> StateFolder:
    """Write the states of every next token behind each prefix, a shard a prefix; resumable as `capture_states`.

    Args:
        lm: the model.
        prefixes: token ids, all different.
        cuts: (layer, site) pairs, of layers 1 to n_layers.
        folder: made where it is not there.
        token_ids: the next tokens; the whole vocabulary where None.
        batch: continuations in one packed pass.
        on_step: told the continuations done and in all.
    """
    if len({tuple(p.tolist()) for p in prefixes}) < len(prefixes) or not prefixes:
        raise OptionError("the prefixes must be different prompts, at least one; drop the repeated ones")
    if any(layer < 1 for layer, _ in cuts) or not cuts:
        raise OptionError("continuations need layers of 1 or more: at layer 0 a state depends on the last token alone")
    tokens = torch.arange(lm.vocab_size) if token_ids is None else token_ids
    writer = StateWriter(
        folder,
        lm,
        cuts,
        n_prompts=len(prefixes) * len(tokens),
        sha256=prompts_sha256([*prefixes, tokens]),
        shard_size=len(tokens),
        source={"name": "continuations", "prefixes": [p.tolist() for p in prefixes]},
    )
    for number, prefix in enumerate(prefixes):
        if number not in writer:
            states = continued_states(lm, prefix, tokens, cuts, batch=batch)
            prompts = [torch.cat([prefix, token[None]]) for token in tokens]
            writer.write(number, prompts, finite_states(cuts, states, first=number * len(tokens)))
        if on_step is not None:
            on_step((number + 1) * len(tokens), len(prefixes) * len(tokens))
    return writer.finish()


def continued_states(
    lm: LanguageModel,
    prefix: Tensor,
    token_ids: Tensor,
    cuts: Sequence[Cut],
    *,
    batch: int = _BATCH,
    on_part: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Return the states of each next token behind one prefix. (P,), (N,) → one (N, D) a cut, on the CPU.

    `on_part` is told the tokens of each pass when it is done.

    Raises:
        OptionError: the model rounds activations to int8, so packed passes do not give its states.
    """
    if rounds_activations(lm.model):
        raise OptionError(
            f"model {lm.name!r} rounds activations to int8, so tokens run packed behind one prefix do not get its "
            "states; load it with quantize 'nf4' or 'fp4', or unquantised"
        )
    layer = max(layer for layer, _ in cuts)
    model = lm.cut(Cut(layer, "final" if any(site == "final" for _, site in cuts) else "block"))
    row = model.row(prefix)
    flags = [(layer, site == "final") for layer, site in cuts]
    parts = []
    for part in token_ids.split(batch):
        states = row.run_at(part, torch.full_like(part, len(prefix)), flags)
        parts.append([rows.cpu() for rows in states])
        if on_part is not None:
            on_part(len(part))
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def distinct_tokens(lm: LanguageModel, token_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the places of tokens with different embedding rows, and the groups of places with equal ones. (N,) → (n,).

    Of each group the first place is among those returned: equal rows have equal states behind any prefix.
    """
    groups = equal_groups(Rows([lm.embeddings.rows(part) for part in token_ids.split(_ROWS)]))
    is_kept = torch.ones(len(token_ids), dtype=torch.bool)
    for group in groups:
        is_kept[group[1:]] = False
    return is_kept.nonzero()[:, 0], groups


def survey_continuations(
    lm: LanguageModel,
    folder: StateFolder,
    *,
    cuts: Sequence[Cut] | None = None,
    threshold: float = THRESHOLD,
    memory: int = MEMORY,
    on_step: OnStep | None = None,
) -> Iterator[ContinuationSurvey]:
    """Yield, for each captured layer, the closest continuations within one prefix and across prefixes.

    Of next tokens whose embedding rows are equal, one takes part: the states of the others differ from
    its own by rounding alone. How many such pairs there are is counted apart.

    Args:
        lm: the model they were captured from; the closest pairs go through it again.
        folder: as `capture_continuations` wrote it, a shard a prefix.
        cuts: (layer, site) pairs; all that were captured where None.
        threshold: L2 distance at or below which a pair counts as a collision.
        memory: bytes a search may use, about.
        on_step: told the searches done at a layer, and in all.
    """
    n_tokens = folder.shards[0].n_prompts
    tokens = torch.stack([ids[-1] for ids in islice(folder.prompts(), n_tokens)])
    kept, groups = distinct_tokens(lm, tokens)
    for cut in folder.cuts if cuts is None else cuts:
        started = time.perf_counter()
        blocks = [block[kept.to(block.device)] for block in folder.blocks(cut)]
        n_searches = len(blocks) * (len(blocks) + 1) // 2
        within: list[PairSearch] = []
        across: list[PairSearch] = []
        for i, block in enumerate(blocks):
            within.append(search_pairs([block], within=threshold, memory=memory))
            for other in blocks[i + 1 :]:
                across.append(search_between([block], [other], within=threshold, memory=memory))
                if on_step is not None:
                    on_step(len(within) + len(across), n_searches)
        numbers = [(i, i) for i in range(len(blocks))]
        mixed = [(i, j) for i in range(len(blocks)) for j in range(i + 1, len(blocks))]
        yield ContinuationSurvey(
            layer=cut[0],
            site=cut[1],
            n_prefixes=len(blocks),
            n_tokens=n_tokens,
            n_equal_rows=n_equal_pairs(groups),
            threshold=threshold,
            within=_summary(lm, folder, cut, kept=kept, numbers=numbers, searches=within),
            across=_summary(lm, folder, cut, kept=kept, numbers=mixed, searches=across),
            least_by_prefix=tuple(found.pairs[0].distance for found in within),
            spread=sampled_spread(blocks),
            seconds=time.perf_counter() - started,
        )


def _summary(
    lm: LanguageModel,
    folder: StateFolder,
    cut: Cut,
    *,
    kept: Tensor,
    numbers: list[tuple[int, int]],
    searches: list[PairSearch],
) -> PairSummary:
    """Sum up searches within a prefix (i, i) or between two (i, j), over the kept continuations of each."""
    closest: ContinuedPair | None = None
    if searches:
        least = min(range(len(searches)), key=lambda n: searches[n].pairs[0].distance)
        pair, (i, j) = searches[least].pairs[0], numbers[least]
        size = folder.shards[0].n_prompts
        first = i * size + int(kept[pair.first])
        second = j * size + int(kept[pair.second - (len(kept) if i != j else 0)])
        closest = _continued_pair(lm, folder, cut, first=first, second=second, distance=pair.distance)
    return PairSummary(
        n_pairs=sum(found.n_covered for found in searches),
        n_equal=sum(found.n_equal for found in searches),
        n_collisions=sum(found.n_collisions for found in searches),
        n_multiplied=sum(found.n_multiplied for found in searches),
        n_decided=sum(found.n_decided for found in searches),
        closest=closest,
    )


def _continued_pair(
    lm: LanguageModel, folder: StateFolder, cut: Cut, *, first: int, second: int, distance: float
) -> ContinuedPair:
    prompts = [folder.prompt(number) for number in (first, second)]
    a, b = (last_states(lm, [ids], [cut])[0][0].double() for ids in prompts)
    norm = float(a.norm() + b.norm()) / 2
    return ContinuedPair(
        first=tuple(prompts[0].tolist()),
        second=tuple(prompts[1].tolist()),
        distance=distance,
        ordinary_distance=float((a - b).norm()),
        relative_to_norm=distance / norm if norm else 0.0,
    )
