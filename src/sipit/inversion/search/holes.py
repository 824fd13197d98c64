"""Positions without a row, decoded by the next row that they shape.

Every later state depends on the token of such a hole. So what may stand there is run together with what
may stand at the next position that has a row, and the pair that gives the row is right. One token is missing
in a vocabulary of V; of several in a row only the sequences that the model expects most are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sipit.inversion.evidence.result import Miss, PositionEvidence
from sipit.inversion.inverses.ridge import ridge
from sipit.inversion.inverses.token_keys import token_keys
from sipit.inversion.judging.check import PackedCheck
from sipit.inversion.proposals.continuations import Continuations
from sipit.inversion.proposals.proposal import SearchView
from sipit.inversion.search.trials import named
from sipit.models.packed_row import in_turn

_NEXT = 8  # tokens that each sequence is run with at the next row, by the inverse
_MANY_NEXT = 64  # of which the row's token is one where it was not among the first
_PAIRS = 1 << 16  # pairs run at last, where no right next token stood out
_ALL_PAIRS = 1 << 17  # or all there are, up to so many: a vocabulary of bytes and a hundred other tokens
_FEW_NEXT = 2  # of those that came nearest: a right one stands out, though what stands in the hole is wrong
_FIRST, _DEEP = 64, 128  # sequences run with the first next tokens, and with many
_LIKELY = 1024  # sequences run with few next tokens before others join
_REORDERED = 128  # tokens run before what they taught puts the rest into another order
_RIDGE = 1e-3
_STARTS, _SWEEPS, _SWEPT = 4, 4, 1024  # sequences gone on from one token at a time; rounds; tokens tried in a place
_MOST = 4096  # sequences tried where more than one token is missing
_NEAREST = 16  # pairs kept that do not fit


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """Tokens for a hole, and one behind it whose row is held."""

    token_ids: tuple[int, ...]  # (G,) of the hole
    next_id: int  # at the row behind it
    distance: float  # L2 to that row
    is_near: bool  # whether it fits


@dataclass(kw_only=True)
class Bridges:
    """What was run over one hole: those that fit, the nearest first, then the nearest of the rest."""

    found: list[Bridge] = field(default_factory=list)
    tried: set[tuple[int, ...]] = field(default_factory=set)  # sequences
    states: dict[int, list[tuple[Tensor, Tensor]]] = field(
        default_factory=dict
    )  # next id → tokens in one place, states

    @property
    def n_tried(self) -> int:
        """Sequences run, each counted once."""
        return len(self.tried)

    @property
    def is_closed(self) -> bool:
        """Whether one fits."""
        return bool(self.found) and self.found[0].is_near

    def next_ids(self, n: int) -> list[int]:
        """Return the n next tokens that came nearest."""
        return list(dict.fromkeys(one.next_id for one in self.found))[:n]

    def add(self, more: Sequence[Bridge]) -> None:
        """Note further ones."""
        best = {(one.token_ids, one.next_id): one for one in [*more, *self.found]}
        self.found = sorted(best.values(), key=lambda one: (not one.is_near, one.distance))
        n_near = sum(one.is_near for one in self.found)
        del self.found[max(n_near, _NEAREST) :]


def n_next_ids(vocab_size: int) -> int:
    """Return how many tokens for the row behind a hole are worth naming: all where every pair can be run."""
    return max(_MANY_NEXT, _n_pairs(vocab_size) // vocab_size)


def _n_pairs(vocab_size: int) -> int:
    return vocab_size**2 if vocab_size**2 <= _ALL_PAIRS else _PAIRS


def bridged(
    view: SearchView, continuations: Continuations, next_ids: Sequence[int], n_missing: int, max_batch: int
) -> Bridges:
    """Return what fits over the hole at the view's position; the passes end with the first that holds a fit.

    The row of the check must hold the prefix before the hole, and nothing behind it.

    Args:
        view: of a search that stands before a hole.
        continuations: of the same view.
        next_ids: what may stand at the first row behind it, the likeliest first. (K,)
        n_missing: tokens of the hole, G.
        max_batch: most tokens in one packed pass.
    """
    n_most = view.lm.vocab_size if n_missing == 1 else _MOST
    sequences = _with_openers(view, continuations.sequences(n_missing, n_most))  # (N, G)
    bridges = Bridges()
    for part, followers in _rounds(view, sequences, next_ids, bridges):
        at_once = max(1, max_batch // (n_missing + len(followers)))
        for each in part.split(at_once):
            run_pairs(view.check, view.position, each, followers, max_batch=max_batch, bridges=bridges)
            if bridges.is_closed:
                return bridges
    if n_missing > 1:
        _descend(view, continuations.sequences(1, _SWEPT)[:, 0], bridges, max_batch)
    return bridges


def _descend(view: SearchView, likely: Tensor, bridges: Bridges, max_batch: int) -> None:
    """From the sequences that came nearest, change one token at a time for what comes nearer, while that helps. (N,)"""
    for start in bridges.found[:_STARTS]:
        at = start
        for _ in range(_SWEEPS):
            before = at.distance
            for place in reversed(range(len(at.token_ids))):
                at = _swept(view, likely, at, place, bridges=bridges, max_batch=max_batch)
                if at.is_near:
                    return
            if at.distance >= before:
                break


def _swept(view: SearchView, likely: Tensor, at: Bridge, place: int, *, bridges: Bridges, max_batch: int) -> Bridge:
    """Return the nearest of a bridge and those that differ from it in one place; likely tokens, then by regression."""
    here = Bridges()
    tokens = likely[: len(likely) // 4]
    for turn in range(2):
        sequences = torch.tensor([at.token_ids]).repeat(len(tokens), 1)  # (N, G)
        sequences[:, place] = tokens
        run_pairs(view.check, view.position, sequences, [at.next_id], max_batch=max_batch, bridges=here, place=place)
        if here.is_closed or turn:
            break
        every = torch.arange(view.lm.vocab_size)
        every = every[~torch.isin(every, tokens)][:, None]
        tokens = _reordered(view, every, here.states[at.next_id])[: len(likely), 0]
    bridges.tried |= here.tried
    bridges.add(here.found)
    return min(here.found[0], at, key=lambda one: (not one.is_near, one.distance))


def _rounds(
    view: SearchView, sequences: Tensor, next_ids: Sequence[int], bridges: Bridges
) -> Iterator[tuple[Tensor, Sequence[int]]]:
    """Yield what to run with what, in turn; the later rounds go by what came nearest in those before."""
    yield sequences[:_FIRST], next_ids[:_NEXT]
    n_run, is_deep = _FIRST, False
    while n_run < len(sequences):
        if n_run >= _LIKELY and not is_deep and len(next_ids) > _NEXT:
            is_deep = True
            yield sequences[:_DEEP], next_ids[_NEXT:_MANY_NEXT]
        few = bridges.next_ids(_FEW_NEXT)
        rest = _reordered(view, sequences[n_run:], bridges.states[few[0]])
        sequences = torch.cat([sequences[:n_run], rest])
        n_more = max(_REORDERED, n_run // 4)
        yield sequences[n_run : n_run + n_more], few
        n_run += n_more
    yield sequences[: _n_pairs(view.lm.vocab_size) // len(next_ids)], next_ids


def _reordered(view: SearchView, rest: Tensor, run: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return sequences of one token, by what the states behind those that were run say of the row. (N, 1) → (N, 1).

    A regression from states at the row to the tokens that led to them, joined with the order they came in, in turns.
    """
    if rest.shape[1] > 1:
        return rest
    keys = token_keys(view.lm)
    tokens = torch.cat([ids for ids, _ in run])
    states = torch.cat([states for _, states in run]).float()
    row = view.values[int(view.is_held[view.position :].int().argmax()) + view.position]
    query = ridge(states, keys.keys(tokens), _RIDGE)(row[None].float())
    cosines = keys.scores(query)[0].cpu()[rest[:, 0]]  # (N,)
    by_score = cosines.argsort(descending=True).argsort()
    both = torch.minimum(2 * by_score, 2 * torch.arange(len(rest)) + 1)
    return rest[both.argsort(stable=True)]


def _with_openers(view: SearchView, sequences: Tensor) -> Tensor:
    """Put the tokens that open prompts before all others where the first one is missing. (N, G) → (N, G)."""
    if view.position or view.lm.tokenizer is None or sequences.shape[1] > 1:
        return sequences
    special = torch.tensor(sorted(set(view.lm.tokenizer.all_special_ids)), dtype=torch.long)[:, None]
    special = special[special[:, 0] < view.lm.vocab_size]
    rest = ~torch.isin(sequences[:, 0], special[:, 0])
    return torch.cat([special, sequences[rest]])


def run_pairs(
    check: PackedCheck,
    position: int,
    sequences: Tensor,
    next_ids: Sequence[int],
    *,
    max_batch: int,
    bridges: Bridges,
    place: int = 0,
) -> None:
    """Run each sequence from a position on with each token that may follow. (N, G) and (K,).

    The states are noted beside the tokens of one place of the sequences.
    """
    n_missing = sequences.shape[1]
    for followers in torch.tensor(list(next_ids)).split(max(1, max_batch - n_missing)):
        _run_with(check, position, sequences, followers, max_batch=max_batch, bridges=bridges, place=place)


def _run_with(
    check: PackedCheck,
    position: int,
    sequences: Tensor,
    followers: Tensor,
    *,
    max_batch: int,
    bridges: Bridges,
    place: int,
) -> None:
    """Run each sequence with each of as many tokens behind it as one pass holds. (N, G) and (K,)."""
    n_missing = sequences.shape[1]
    branch = n_missing + len(followers)
    attends = torch.eye(branch, dtype=torch.bool)
    attends[:, :n_missing] = True
    attends[:n_missing, :n_missing] = in_turn(n_missing)
    places = [*range(position, position + n_missing), *[position + n_missing] * len(followers)]
    for part in sequences.split(max(1, max_batch // branch)) if len(sequences) else ():
        tokens = torch.cat([part, followers.expand(len(part), -1)], dim=1).flatten()  # (B * (G + K),)
        positions = torch.tensor(places).repeat(len(part))
        judged = check.run(tokens, positions, torch.block_diag(*[attends] * len(part)).bool())
        near = judged.is_near.cpu().view(len(part), branch)[:, n_missing:]  # (B, K)
        distances = judged.distances.cpu().view(len(part), branch)[:, n_missing:]
        bridges.tried.update(map(tuple, part.tolist()))
        by_branch = judged.states.view(len(part), branch, -1)
        for column, next_id in enumerate(followers.tolist()):
            bridges.states.setdefault(next_id, []).append((part[:, place], by_branch[:, n_missing + column]))
        bridges.add(list(_noted(part, followers, near, distances)))


def _noted(part: Tensor, followers: Tensor, near: Tensor, distances: Tensor) -> Iterator[Bridge]:
    """Yield the pairs that fit, and the nearest of the others."""
    order = distances.masked_fill(near, -1).flatten().argsort()[: max(int(near.sum()), _NEAREST)]
    for place in order.tolist():
        row, column = divmod(place, len(followers))
        yield Bridge(
            token_ids=tuple(part[row].tolist()),
            next_id=int(followers[column]),
            distance=float(distances[row, column]),
            is_near=bool(near[row, column]),
        )


def evidence_over_hole(view: SearchView, found: Sequence[Bridge], place: int, n_tried: int) -> PositionEvidence:
    """Return the evidence for a token of the hole at the view's position.

    Args:
        view: of the search.
        found: what was run over the hole, the accepted sequence first.
        place: of the token in the hole.
        n_tried: sequences that were run to find it.
    """
    best = found[0]
    others = [one for one in found if one.token_ids[place] != best.token_ids[place]]
    rivals = {one.token_ids[place]: one.distance for one in reversed(others) if one.is_near}
    return PositionEvidence(
        token_id=best.token_ids[place],
        token=view.lm.decode([best.token_ids[place]]),
        distance=best.distance,
        tolerance=view.check.limit(view.position + len(best.token_ids)),
        runner_up=min((one.distance for one in others), default=None),
        n_checked=n_tried,
        rivals=named(view.lm, [(i, rivals[i]) for i in sorted(rivals, key=lambda i: rivals[i])]),
        is_held=False,
    )


def missed_hole(view: SearchView, bridges: Bridges, n_missing: int) -> Miss:
    """Return the miss where nothing that was run over the hole at the view's position gives the next row."""
    best = bridges.found[0]
    behind = view.position + n_missing
    where = f"position {view.position}" if n_missing == 1 else f"positions {view.position} to {behind - 1}"
    tried = f"none of the {bridges.n_tried} {'tokens' if n_missing == 1 else 'sequences'} tried"
    way_out = "" if view.position else "; pass the tokens before the first row where you know them"
    return Miss(
        position=view.position,
        token_id=best.token_ids[0],
        token=view.lm.decode([best.token_ids[0]]),
        distance=best.distance,
        tolerance=view.check.limit(behind),
        n_checked=bridges.n_tried,
        runner_up=bridges.found[1].distance if len(bridges.found) > 1 else None,
        diagnosis=f"no row is held at {where}, and {tried} there gives the row at position {behind}{way_out}",
    )
