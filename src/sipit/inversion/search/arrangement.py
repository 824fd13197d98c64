"""Rows out of their order, and columns behind one secret permutation, put back.

A bag of states still holds each of them, and a permutation of columns leaves each row's sorted values as they
are: the distance between two sorted rows is the least that any permutation leaves, so the right token fits.
What is found here is a proposal; the inversion of the arranged rows proves it. Source of both settings:
arXiv 2505.18332.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sipit.errors import OptionError
from sipit.inversion.inverses.inverse import Inverse, queries_of
from sipit.inversion.inverses.restored import restored
from sipit.inversion.inverses.ridge_inverse import ridge_inverse
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.tolerance import Tolerance, tolerance_for
from sipit.inversion.proposals.continuations import opening_log_probabilities
from sipit.inversion.search.first_states import first_states
from sipit.models import LanguageModel, PackedRow
from sipit.observations import Observation

_DEPTHS = (1, 8, 64)  # tokens tried of each row, in turn
_DEEPER, _DEEPEST = 2, 512  # batches of the likeliest tokens then, and tokens of each row, before the whole vocabulary
_BATCH = 512  # tokens run at once


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Where the rows and columns of an observation belong, as far as its tokens could be followed."""

    row_order: tuple[int, ...]  # (T,) row of the observation at each place; () where they were in order
    column_order: tuple[int, ...]  # (W,) column of the observation at each coordinate; () where they were in order
    input_ids: tuple[int, ...]  # tokens that were followed, from the first row on


def arrangement_of(
    lm: LanguageModel, seen: Observation, meter: Meter, *, is_shuffled: bool = False, is_permuted: bool = False
) -> Arrangement:
    """Return the order of rows, of columns, or of both, by the tokens that they fit one after the other.

    Args:
        lm: the model the rows come from.
        seen: all rows behind its known prefix, in any order where `is_shuffled`.
        meter: counts what was spent.
        is_shuffled: whether the rows are out of order.
        is_permuted: whether the columns are, all rows' alike.

    Raises:
        OptionError: the site's values are not states, or rows are missing.
    """
    read = restored(lm, seen.cut)
    if not read.are_states or lm.width(seen.cut) != lm.width(read.cut):
        raise OptionError(f"rows or columns of site {seen.site!r} cannot be put in order; it takes block or final")
    if not seen.is_complete:
        raise OptionError("rows can only be put in order where one is held of every position behind the known prefix")
    walk = _Walk(lm, seen, meter, is_shuffled=is_shuffled, is_permuted=is_permuted)
    while walk.left and (is_shuffled or walk.columns_are_doubtful):
        if not walk.step():
            break
    return Arrangement(
        row_order=tuple(walk.order + walk.left) if is_shuffled else (),
        column_order=tuple(walk.columns.tolist()) if is_permuted else (),
        input_ids=tuple(walk.prefix[len(seen.known_prefix) :]),
    )


@dataclass
class _Walk:
    """The rows that were followed, and what they say of the columns."""

    lm: LanguageModel
    seen: Observation
    meter: Meter
    is_shuffled: bool
    is_permuted: bool
    prefix: list[int] = field(init=False)
    order: list[int] = field(init=False, default_factory=list)  # rows that were followed
    left: list[int] = field(init=False)  # the others
    columns: Tensor = field(init=False)  # (W,)
    columns_are_doubtful: bool = field(init=False)
    _row: PackedRow = field(init=False)
    _inverse: Inverse = field(init=False)
    _tolerance: Tolerance = field(init=False)
    _computed: list[Tensor] = field(init=False, default_factory=list)  # (W,) of each row followed

    def __post_init__(self) -> None:
        lm, seen = self.lm, self.seen
        self.prefix = list(seen.known_prefix)
        self.left = list(range(seen.seq_len))
        self.columns = torch.arange(seen.d_model)
        self.columns_are_doubtful = self.is_permuted
        self._row = lm.cut(seen.cut, seq_len=seen.n_positions).row(torch.tensor(self.prefix, dtype=torch.long))
        self.meter.spend(len(self.prefix), seen.layer)
        self._inverse = ridge_inverse(lm, restored(lm, seen.cut).cut, self.meter)
        self._observed = seen.states.float().to(self.lm.device)  # (T, W)
        self._tolerance = tolerance_for(lm, seen)

    def step(self) -> bool:
        """Follow one more row; return whether there was one."""
        rows = list(self.left) if self.is_shuffled else self.left[:1]
        tried = torch.zeros(self.lm.vocab_size, dtype=torch.bool)
        for tokens in self._offered(rows):
            fresh = tokens[~tried[tokens]].unique()
            for part in fresh.split(_BATCH) if len(fresh) else ():
                tried[part] = True
                if self._try(part, rows):
                    return True
        return False

    def _offered(self, rows: list[int]) -> Iterator[Tensor]:
        """Yield tokens to try, in turn, from what each row reads as; all of them at last."""
        is_read = bool(self._computed) or not self.is_permuted
        if is_read:
            states = restored(self.lm, self.seen.cut).rows(
                self._observed[rows][:, self.columns], torch.full((len(rows),), len(self.prefix))
            )
            scores = self._inverse.scores(queries_of(self._inverse, states))  # (R, V)
            for depth in _DEPTHS:
                yield _best(scores, depth)
        order = self._likely().argsort(descending=True).cpu()
        yield from order[: _DEEPER * _BATCH].split(_BATCH)
        if is_read:
            yield _best(scores, _DEEPEST)
        yield from order[_DEEPER * _BATCH :].split(_BATCH)

    def _likely(self) -> Tensor:
        """Return log-probabilities of the next token behind the prefix, by the model itself. (V,)."""
        if not self.prefix:
            return opening_log_probabilities(self.lm, self.meter)
        full = self.lm.cut(self.lm.final_cut, seq_len=self.seen.n_positions)
        finals = full.ordinary(torch.tensor(self.prefix))
        self.meter.spend(len(self.prefix), full.layer)
        return self.lm.next_token_logits(finals[-1:])[0].log_softmax(dim=0)

    def _try(self, tokens: Tensor, rows: list[int]) -> bool:
        """Check tokens against the rows; keep the nearest that fits. (N,)."""
        states = self._states(tokens)  # (N, W)
        limits = self._tolerance.total[rows].float().to(states.device)  # (R,)
        plain = _distances(states, self._observed[rows][:, self.columns])  # (N, R)
        ratios = plain / limits
        is_sorted = self.columns_are_doubtful and not bool((ratios <= 1).any())
        if is_sorted:
            ratios = _distances(states.sort(dim=1).values, self._observed[rows].sort(dim=1).values) / limits
        best = int(ratios.argmin())
        token, row = divmod(best, len(rows))
        if float(ratios.flatten()[best]) > 1:
            return False
        self._run(tokens[token][None])  # in the pass that keeps it as the prefix of what follows
        self._row.keep([0])
        self.prefix.append(int(tokens[token]))
        self._computed.append(states[token])
        self.left.remove(rows[row])
        self.order.append(rows[row])
        if is_sorted:
            self.columns = self._matched()
        elif len(self._computed) > 1:  # columns found by the earlier rows fit one that they were not found by
            self.columns_are_doubtful = False
        return True

    def _states(self, tokens: Tensor) -> Tensor:
        """Return the states of tokens behind the prefix; those of a prompt's first one are kept for the next. (N,)."""
        firsts = None if self.prefix else first_states(self.lm, self.seen.cut, self.seen.n_positions)
        if firsts is None:
            return self._run(tokens)
        fresh = tokens[~torch.isin(tokens, firsts.token_ids)]
        if len(fresh):
            firsts.note(fresh, self._run(fresh))
        return firsts.of(tokens).float()

    def _run(self, tokens: Tensor) -> Tensor:
        self.meter.spend(len(tokens), self.seen.layer)
        self.meter.n_checked += len(tokens)
        return self._row.run(tokens, torch.full_like(tokens, len(self.prefix))).float()

    def _matched(self) -> Tensor:
        """Return the column of the observation at each coordinate, by the values of all rows followed. (W,)."""
        ours = torch.stack(self._computed)  # (R, W)
        theirs = self._observed[self.order]
        scale = self._tolerance.total[self.order].float().to(ours.device)[:, None]
        cost = _distances((ours / scale).T.contiguous(), (theirs / scale).T.contiguous())  # (W, W)
        nearest = cost.argmin(dim=1)
        found = torch.full((len(nearest),), -1, device=nearest.device)
        free = torch.ones_like(found, dtype=torch.bool)
        for place in cost.amin(dim=1).argsort().tolist():  # equal columns go to equal ones, in turn
            column = int(nearest[place])
            if not bool(free[column]):
                column = int(cost[place].masked_fill(~free, torch.inf).argmin())
            found[place] = column
            free[column] = False
        return found


def _best(scores: Tensor, depth: int) -> Tensor:
    """Return the best tokens of each row. (R, V) → (R · depth,) on the CPU."""
    return scores.topk(min(depth, scores.shape[1]), dim=1).indices.flatten().cpu()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the L2 distance of each row to each other one, by differences. (N, W), (R, W) → (N, R)."""
    return torch.stack([(rows - other).norm(dim=1) for other in others], dim=1)
