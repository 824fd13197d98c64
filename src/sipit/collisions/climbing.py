"""Searched near-collisions: from a close pair, change tokens as long as the states come closer.

Each round proposes edits of one prompt or of both, runs them, and keeps the one that lowers the
relative distance most. The prompts stay different in ids; they may share their last tokens, which is
where a difference fades. An edit is accepted on the states of ordinary forward passes, one prompt at
a time, subtracted in float64; the batches only rank. It is a search: that it finds no collision
proves nothing. The slope of the distance in embedding space is not used: in a trial on one pair at
two layers of a real model none of its 64 steepest swaps came closer; near rows and chance did at one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from sipit.collisions.scales import THRESHOLD
from sipit.collisions.states import OnStep, last_states
from sipit.errors import NonFiniteError, OptionError
from sipit.models import LanguageModel
from sipit.observations import Cut, Site

# swap, insert, delete: in one prompt; swap_both, insert_both: the same token, equally far from both ends
Edit = Literal["swap", "insert", "delete", "swap_both", "insert_both"]
EDITS: tuple[Edit, ...] = get_args(Edit)
Source = Literal["near", "own", "random"]  # where a new token comes from
SOURCES: tuple[Source, ...] = get_args(Source)

_PATIENCE = 3  # rounds without a better pair before giving up
_CONFIRMED = 4  # best-ranked edits that are confirmed by ordinary passes, at most
_NEAR_ROWS = 32  # nearest embedding rows a token may be swapped for

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ClimbStep:
    """The pair after one accepted edit; the first step is the start."""

    edit: str  # "start", or an edit and where its token came from
    first_ids: list[int]
    second_ids: list[int]
    distance: float  # L2
    relative_to_norm: float  # distance / mean norm of the two states
    n_evaluated: int  # pairs evaluated so far


@dataclass(frozen=True, kw_only=True)
class Climb:
    """Where a climb started, each edit it kept, and where it ended."""

    layer: int
    site: Site
    steps: list[ClimbStep]  # relative distance falls from one to the next
    first_ids: list[int]
    second_ids: list[int]
    first_text: str | None  # None without a tokenizer
    second_text: str | None
    distance: float  # L2, of states from ordinary passes
    relative_to_norm: float
    threshold: float  # L2
    is_within: bool  # distance at or below the threshold
    is_equal: bool  # the states are equal in every value
    is_stalled: bool  # three rounds in a row found nothing better
    n_rounds: int
    n_evaluated: int  # pairs
    token_evaluations: int  # tokens run to evaluate them


def climb(
    lm: LanguageModel,
    first: Tensor,
    second: Tensor,
    cut: Cut,
    *,
    rounds: int = 16,
    n_candidates: int = 96,
    edits: Sequence[Edit] = EDITS,
    sources: Sequence[Source] = SOURCES,
    max_growth: int = 8,
    threshold: float = THRESHOLD,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Climb:
    """Climb from one pair of prompts towards a collision of their last-token states.

    Args:
        lm: the model.
        first: token ids. (T,)
        second: token ids of another prompt. (U,)
        cut: (layer, site).
        rounds: of proposals, at most.
        n_candidates: pairs proposed a round.
        edits: kinds of edits to propose.
        sources: where new tokens come from: the nearest embedding rows of the token there, the two
            prompts' own tokens, chance.
        max_growth: tokens by which a prompt may outgrow the longer of the two at the start.
        threshold: largest L2 distance called a collision.
        generator: of all draws; default: seeded with 0.
        on_step: told the rounds done and in all.

    Raises:
        OptionError: the prompts are the same, or an option is out of range.
        NonFiniteError: a state of the pair holds NaN or infinity.
    """
    _check_options(first, second, rounds=rounds, n_candidates=n_candidates, edits=edits, sources=sources)
    search = _Search(lm, cut, edits, sources, generator or torch.Generator().manual_seed(0))
    search.max_length = max(len(first), len(second)) + max_growth
    if lm.max_positions is not None:
        search.max_length = min(search.max_length, lm.max_positions)
    pair: Pair = (tuple(first.tolist()), tuple(second.tolist()))
    distance, relative, is_equal = search.measured(pair)
    if relative is None:
        raise NonFiniteError(f"the states of the pair at layer {cut[0]} are not finite; start from another pair")
    steps = [_step("start", pair, distance, relative, 0)]
    n_stalled = n_rounds = 0
    while n_rounds < rounds and n_stalled < _PATIENCE and distance > 0:
        n_rounds += 1
        n_stalled += 1
        for edit, other in search.ranked(pair, n_candidates):
            new_distance, new_relative, new_equal = search.measured(other)
            if new_relative is not None and new_relative < relative:
                pair, distance, relative, is_equal = other, new_distance, new_relative, new_equal
                steps.append(_step(edit, pair, distance, relative, search.n_evaluated))
                n_stalled = 0
                break
        if on_step is not None:
            on_step(n_rounds, rounds)
    return Climb(
        layer=cut[0],
        site=cut[1],
        steps=steps,
        first_ids=list(pair[0]),
        second_ids=list(pair[1]),
        first_text=lm.decode(pair[0]),
        second_text=lm.decode(pair[1]),
        distance=distance,
        relative_to_norm=relative,
        threshold=threshold,
        is_within=distance <= threshold,
        is_equal=is_equal,
        is_stalled=n_stalled >= _PATIENCE,
        n_rounds=n_rounds,
        n_evaluated=search.n_evaluated,
        token_evaluations=search.token_evaluations,
    )


class _Search:
    """Proposes edits of a pair and ranks them by the distance they lead to."""

    max_length = 0  # tokens of a prompt

    def __init__(
        self,
        lm: LanguageModel,
        cut: Cut,
        edits: Sequence[Edit],
        sources: Sequence[Source],
        generator: torch.Generator,
    ) -> None:
        self.lm = lm
        self.cut = cut
        self.n_evaluated = 0
        self.token_evaluations = 0
        self._edits = tuple(edits)
        self._sources = tuple(sources)
        self._generator = generator
        self._known: dict[int, list[int]] = {}  # token → nearest tokens

    def measured(self, pair: Pair) -> tuple[float, float | None, bool]:
        """Return (distance, relative, whether equal) from ordinary passes; relative is None if not finite."""
        cut = self.lm.cut(self.cut)
        a, b = (cut.ordinary(torch.tensor(ids))[-1].cpu() for ids in pair)  # (D,) each
        self.token_evaluations += len(pair[0]) + len(pair[1])
        distance, relative = _distances(a[None], b[None])
        is_finite = bool(torch.isfinite(relative[0]))
        return float(distance[0]), float(relative[0]) if is_finite else None, torch.equal(a, b)

    def ranked(self, pair: Pair, n: int) -> list[tuple[str, Pair]]:
        """Return the best few of n edited pairs, the closest first."""
        proposed: dict[Pair, str] = {}
        proposals = self._proposals(pair)
        for _ in range(4 * n):  # some edits give a pair already proposed, or two equal prompts
            edit, other = next(proposals)
            if other != pair and other[0] != other[1] and min(map(len, other)) > 0:
                proposed.setdefault(other, edit)
            if len(proposed) == n:
                break
        if not proposed:
            return []
        prompts = list(dict.fromkeys(ids for other in proposed for ids in other))
        place = {ids: i for i, ids in enumerate(prompts)}
        (states,) = last_states(self.lm, [torch.tensor(ids) for ids in prompts], [self.cut])
        self.n_evaluated += len(proposed)
        self.token_evaluations += sum(map(len, prompts))
        left, right = (states[[place[other[side]] for other in proposed]] for side in (0, 1))
        order = _distances(left, right)[1].nan_to_num(nan=torch.inf).argsort(stable=True)[:_CONFIRMED].tolist()
        pairs = list(proposed)
        return [(proposed[pairs[i]], pairs[i]) for i in order]

    def _proposals(self, pair: Pair) -> Iterator[tuple[str, Pair]]:
        """Yield edits without end, kinds and sources in turn."""
        turn = 0
        while True:
            edit = self._edits[turn % len(self._edits)]
            source = self._sources[turn // len(self._edits) % len(self._sources)]
            turn += 1
            yield self._drawn(pair, edit, source, self._draw(2))

    def _drawn(self, pair: Pair, edit: Edit, source: Source, side: int) -> tuple[str, Pair]:
        ids = pair[side]
        if edit in ("swap", "delete"):
            place = self._draw(len(ids))
            new = () if edit == "delete" else (self._token(ids[place], source, pair),)
            return self._label(edit, source), _replaced(pair, side, (*ids[:place], *new, *ids[place + 1 :]))
        if edit == "insert":
            place = self._draw(len(ids) + 1)
            token = self._token(ids[min(place, len(ids) - 1)], source, pair)
            return self._label(edit, source), self._bounded(
                pair, _replaced(pair, side, (*ids[:place], token, *ids[place:]))
            )
        behind = self._draw(min(map(len, pair)))  # tokens of both prompts behind the place
        token = self._token(ids[len(ids) - 1 - behind], source, pair)
        gone = 1 if edit == "swap_both" else 0
        cuts = [(prompt[: len(prompt) - behind - gone], prompt[len(prompt) - behind :]) for prompt in pair]
        one, two = ((*before, token, *after) for before, after in cuts)
        return self._label(edit, source), self._bounded(pair, (one, two))

    @staticmethod
    def _label(edit: Edit, source: Source) -> str:
        return edit if edit == "delete" else f"{edit} ({source})"

    def _bounded(self, pair: Pair, longer: Pair) -> Pair:
        return longer if max(map(len, longer)) <= self.max_length else pair

    def _token(self, token: int, source: Source, pair: Pair) -> int:
        """Return a new token in place of one: a near row, or one of the prompts' own, or any."""
        if source == "near":
            if token not in self._known:
                row = self.lm.embeddings.rows(torch.tensor([token]))[0]
                squared = self.lm.embeddings.squared_distances(row)
                n_rows = min(_NEAR_ROWS + 1, self.lm.vocab_size)
                self._known[token] = [i for i in squared.topk(n_rows, largest=False).indices.tolist() if i != token]
            return self._known[token][self._draw(len(self._known[token]))]
        if source == "own":
            own = pair[0] + pair[1]
            return own[self._draw(len(own))]
        return self._draw(self.lm.vocab_size)

    def _draw(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self._generator))


def _distances(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each row of one to that of the other, and that over their mean norm, in float64."""
    left, right = left.double(), right.double()
    distance = torch.linalg.vector_norm(left - right, dim=1)
    return distance, 2 * distance / (left.norm(dim=1) + right.norm(dim=1)).clamp(min=1e-300)


def _replaced(pair: Pair, side: int, ids: tuple[int, ...]) -> Pair:
    return (ids, pair[1]) if side == 0 else (pair[0], ids)


def _step(edit: str, pair: Pair, distance: float, relative: float, n_evaluated: int) -> ClimbStep:
    return ClimbStep(
        edit=edit,
        first_ids=list(pair[0]),
        second_ids=list(pair[1]),
        distance=distance,
        relative_to_norm=relative,
        n_evaluated=n_evaluated,
    )


def _check_options(
    first: Tensor, second: Tensor, *, rounds: int, n_candidates: int, edits: Sequence[Edit], sources: Sequence[Source]
) -> None:
    if torch.equal(first, second):
        raise OptionError("both prompts have the same token ids, so they collide by definition; pass two prompts")
    if rounds < 0 or n_candidates < 1:
        raise OptionError(f"need rounds of 0 or more and 1 candidate or more, got {rounds} and {n_candidates}")
    for name, given, known in (("edit", edits, EDITS), ("source", sources, SOURCES)):
        unknown = [one for one in given if one not in cast(tuple[str, ...], known)]
        if unknown or not given:
            raise OptionError(f"unknown {name} {unknown}; choose one or more of {', '.join(known)}")
