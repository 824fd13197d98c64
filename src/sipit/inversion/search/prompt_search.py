"""One search under way: from what a proposal offers to accepted tokens, position by position.

No token is accepted because a proposal liked it, and a vocabulary without a match ends the search
with the prefix kept and the miss described.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest

import torch
from torch import Tensor

from sipit.inversion.evidence.result import Miss, PositionEvidence, Verdict
from sipit.inversion.judging.check import Checked
from sipit.inversion.proposals import Proposal, SearchView
from sipit.inversion.proposals.continuations import Continuations
from sipit.inversion.proposals.proposal import Draft
from sipit.inversion.search.accept_rule import AcceptRule, Retry
from sipit.inversion.search.first_states import FirstStates, first_states
from sipit.inversion.search.forks import Fork, followed
from sipit.inversion.search.holes import bridged, evidence_over_hole, missed_hole, n_next_ids, run_pairs
from sipit.inversion.search.tree import Tree, build_tree
from sipit.inversion.search.trials import Outcome, Trials, named, outcomes_of

_FIRST_BATCH = 16
_GROWTH = 4
_RECALLED = 4096  # states kept of an earlier search that are compared at once
# Behind a token that may be another one, the observed state may have another prefix than the accepted one, and the
# right token lies by some tolerances too far: up to this many, what was checked is named as well.
_BEHIND_RIVALS = 4.0
_DOUBTED_AFTER = 128  # candidates checked in vain behind a fork before its other tokens are
_NEXT = 16  # nearest candidates behind a fork that each of its tokens is run with
_PAIRS = 1 << 15  # of a token of the fork and one behind it that are run once all of the vocabulary was tried there
_FORK_PASSES = 1 << 10  # that settling a fork takes at most: where few tokens go into one, fewer pairs are run


@dataclass
class PromptSearch:
    """One search under way: plans packed passes, and walks along what came out of them."""

    view: SearchView
    proposal: Proposal
    exhaustive: bool
    max_batch: int
    patience: int | None = None  # candidates checked in vain at a position that end the search; None: the vocabulary
    evidence: list[PositionEvidence] = field(default_factory=list)
    miss: Miss | None = None
    accepted_by_noise: bool = False
    fork: Fork | None = None  # the last position where several tokens fit, until what follows has settled it
    next_ids: tuple[int, ...] = ()  # the nearest candidates at the position behind it
    _tried: Trials = field(init=False)
    _rule: AcceptRule = field(init=False)
    _is_doubted: bool = field(init=False, default=False)  # whether the pass just walked ended at a token that fits not
    _size: int = field(init=False)
    _queued: Tensor = field(init=False)  # a token that fits, to be run with its twins in the next pass
    _is_settling: bool = field(init=False, default=False)  # whether the pass under way is such a one
    _continuations: Continuations | None = field(init=False, default=None)  # once a hole was met

    def __post_init__(self) -> None:
        self._rule = AcceptRule(self.view, self.exhaustive, self.max_batch)
        self._begin()

    def verdict(self) -> Verdict:
        """Return what the evidence amounts to."""
        if self.miss is not None:
            return "unmatched"
        if self.accepted_by_noise or any(p.rivals for p in self.evidence):
            return "ambiguous"
        return "recovered"

    @property
    def is_done(self) -> bool:
        """Whether every position is settled, or one is a miss."""
        return self.miss is not None or self.view.position >= self.view.seen.seq_len

    @property
    def is_aside(self) -> bool:
        """Whether passes of its own come next: over a hole, or to settle a fork."""
        return not self.is_done and (self._is_forked or self._is_at_hole)

    def step_aside(self) -> None:
        """Make them."""
        if self._is_forked:
            self._settle_fork()
        else:
            self._bridge_hole()

    @property
    def _is_forked(self) -> bool:
        """Whether it is time to settle the fork: behind it a token fits, or none of many does."""
        return self.fork is not None and bool(self.next_ids)

    @property
    def _is_at_hole(self) -> bool:
        return not bool(self.view.is_held[self.view.position])

    @property
    def _is_behind_fork(self) -> bool:
        return self.fork is not None and self.view.position == self.fork.position + 1

    @property
    def _is_in_doubt(self) -> bool:
        """Whether many candidates behind a fork were checked in vain."""
        is_vain = self._tried.n_checked >= _DOUBTED_AFTER and not len(self._queued)
        is_first = self.fork is not None and not self.fork.is_doubted
        return is_first and self._is_behind_fork and is_vain and not self._tried.best().is_near

    def _likely_next(self, wanted: int) -> tuple[int, ...]:
        """Return candidates behind the fork that each of its tokens is run with: as many as its passes allow.

        In turn what the proposal expects there and what came nearest: behind a wrong token the right one may lie far.
        """
        assert self.fork is not None
        n = max(1, min(wanted, _FORK_PASSES * self.max_batch // len(self.fork.token_ids)))
        expected, nearest = self.proposal.guesses(self.view.position, n).tolist(), self._tried.nearest(n)
        in_turn = [token_id for pair in zip_longest(expected, nearest) for token_id in pair if token_id is not None]
        return tuple(dict.fromkeys(in_turn))[:n]

    def _settle_fork(self) -> None:
        """Run the tokens of the fork with what may follow them, and go on behind the best of those that survive.

        Where none does, an earlier token is wrong, or the rows are: then the nearest at the fork stays.
        """
        view, check, fork = self.view, self.view.check, self.fork
        assert fork is not None
        n_known = len(view.prefix) - len(self.evidence)
        check.row.forget(check.lane, fork.position)
        ranked = followed(check, fork, self.next_ids, self.max_batch)
        alive = [one for one in ranked if one.is_near]
        distances = dict(zip(fork.token_ids.tolist(), fork.distances.tolist(), strict=True))
        chosen = alive[0].token_id if alive else int(fork.token_ids[0])
        here = self.evidence[fork.position - n_known]
        # Behind a token that may be another one, what lies some tolerances away may be right all the same.
        is_unsure = any(evidence.rivals for evidence in self.evidence[: fork.position - n_known])
        reach = _BEHIND_RIVALS * check.limit(fork.position + 1) if is_unsure else 0.0
        kept = {one.token_id for one in ranked if one.is_near or not alive or one.distance <= reach}
        rivals = [(i, d) for i, d in distances.items() if i != chosen and i in kept]
        rivals += [(r.token_id, r.distance) for r in here.rivals if r.token_id not in distances]
        del self.evidence[fork.position - n_known :], view.prefix[fork.position :]
        self._keep([chosen], fork.position)
        self.evidence.append(
            replace(
                here,
                token_id=chosen,
                token=view.lm.decode([chosen]),
                distance=distances[chosen],
                runner_up=min((d for i, d in distances.items() if i != chosen), default=here.runner_up),
                rivals=named(view.lm, rivals),
            )
        )
        self.fork = None if alive or fork.is_doubted else replace(fork, is_doubted=True)
        self.next_ids = ()
        self._begin()
        if alive:
            self._queued = torch.tensor([alive[0].next_id])

    def _keep(self, token_ids: Sequence[int], position: int) -> None:
        """Go on behind tokens that were accepted in passes of their own."""
        view, check = self.view, self.view.check
        check.row.extend(torch.tensor(list(token_ids)), position=position, lane=check.lane)
        view.meter.spend(len(token_ids), check.cut.layer)
        view.prefix.extend(token_ids)

    def _bridge_hole(self) -> None:
        """Accept for positions without a row what gives the next row, together with a token there."""
        view = self.view
        position = view.position
        n_missing = int(view.is_held[position:].int().argmax())
        if self._continuations is None:
            self._continuations = Continuations(view)
        next_ids = self.proposal.guesses(position + n_missing, n_next_ids(view.lm.vocab_size)).tolist()
        bridges = bridged(view, self._continuations, next_ids, n_missing, self.max_batch)
        best = bridges.found[0]
        if not best.is_near:
            self.miss = missed_hole(view, bridges, n_missing)
            return
        n_tried = bridges.n_tried
        for place, token_id in enumerate(best.token_ids):  # what may fit in the hole beside it was not all tried
            others = torch.tensor(self._rule.beside.of(token_id, position + n_missing, is_own=False), dtype=torch.long)
            sequences = torch.tensor([best.token_ids]).repeat(len(others), 1)
            sequences[:, place] = others
            run_pairs(view.check, position, sequences, [best.next_id], max_batch=self.max_batch, bridges=bridges)
        best = bridges.found[0]
        self.evidence += [evidence_over_hole(view, bridges.found, place, n_tried) for place in range(n_missing)]
        self._keep(best.token_ids, position)
        self._begin()
        self._queued = torch.tensor([best.next_id])

    def plan(self, room: int | None = None) -> Tree | None:
        """Return the next packed pass: candidates for the next position, and guesses behind the best of them.

        Guesses fill the room that there is for them, a whole pass by default; candidates may take more. None once the
        search is done, or where passes of its own come next: `is_aside`.
        """
        while not (self.is_done or self.is_aside):
            if self._is_in_doubt:
                self.next_ids = self._likely_next(_NEXT)
                continue
            self._is_settling = len(self._queued) > 0
            batch = self._queued if self._is_settling else self._proposed()
            self._queued = self._queued[:0]
            if len(batch) == 0 and self.fork is not None and self._is_behind_fork:
                self.fork = replace(self.fork, is_doubted=True)
                self.next_ids = self._likely_next(max(_NEXT, _PAIRS // len(self.fork.token_ids)))
                continue
            if len(batch) == 0:
                self._conclude()
                continue
            speculates = not self._rule.tries_all and not self._is_settling
            draft = self._draft() if speculates else None
            return build_tree(
                batch,
                self.view.position,
                draft,
                max_tokens=max(len(batch), room or self.max_batch),
                price=self.view.price,
                beside=self._rule.beside.of_guesses,
            )
        return None

    def _draft(self) -> Draft | None:
        """Return guesses for the positions behind this one, up to the next hole."""
        draft = self.proposal.draft()
        if draft is None or self.view.is_gapless:
            return draft
        n_held = int((~self.view.is_held[self.view.position + 1 :]).int().cumsum(dim=0).eq(0).sum())
        return replace(draft, ahead=islice(draft.ahead, n_held))

    def _proposed(self) -> Tensor:
        """Return candidates not tried yet; none once the whole vocabulary was, or all patience is spent. (N,)."""
        if self._rule.tries_all:  # all will be checked: no order is worth its price
            self._recall()
            return self._tried.untried.nonzero()[: self.max_batch, 0]
        if self.patience is not None and self._tried.n_checked >= self.patience:
            return self._queued[:0]
        untried = self._tried.untried
        limit = min(self._size, self.max_batch, self.proposal.batch_limit or self.max_batch)
        batch = self.proposal.next(limit, untried)
        batch = batch[untried[batch]]  # whatever a proposal says, no token is tried twice
        self._size *= _GROWTH
        # where the proposal has no more, whatever it left out comes last
        return batch if len(batch) else untried.nonzero()[: self.max_batch, 0]

    def _recall(self) -> None:
        """At the first position: compare the states of what an earlier prompt's search ran there."""
        kept = self._first_states()
        if kept is None:
            return
        known = kept.token_ids
        for ids in known[self._tried.untried[known]].split(_RECALLED):
            self._tried.add(outcomes_of(self.view.check.compared(ids, torch.zeros_like(ids), kept.of(ids))))

    def _first_states(self) -> FirstStates | None:
        """Return what is kept of first states where all are tried; None elsewhere, and where they are too many."""
        if self.view.prefix or not self._rule.tries_all:
            return None
        return first_states(self.view.lm, self.view.seen.cut, self.view.seen.n_positions)

    def walk(self, tree: Tree, states: Tensor) -> list[int]:
        """Accept along the tree as long as a token fits; return the columns to keep. (Q, D).

        Only nodes behind accepted tokens count. `settle` is to follow once the columns are kept.
        """
        checked = self.view.check.judge(tree.token_ids, tree.positions, states)
        accepted: list[int] = []
        kept = self._first_states()
        if kept is not None:
            kept.note(tree.token_ids, states)
        outcomes = outcomes_of(checked)
        columns = tree.behind()
        while columns:
            self._tried.add(outcomes[column] for column in columns)
            ran = [outcomes[column].token_id for column in columns]
            decision = self._rule.after_pass(self._tried, ran, is_settling=self._is_settling)
            if isinstance(decision, Retry):
                self._queued = decision.token_ids
                return accepted
            if decision is None:
                self.proposal.learn(checked.subset(columns))
                self._is_doubted = True
                break
            column = columns[ran.index(decision.best.token_id)]
            accepted.append(column)
            self._accept(decision.best)
            columns = tree.behind(column)
        self._overhear(tree, checked, accepted, columns)
        return accepted

    def _overhear(self, tree: Tree, checked: Checked, accepted: list[int], tried: list[int]) -> None:
        """Hand on what was checked from the position that the search stands at, behind a wrong token.

        Of a token that was run behind several wrong prefixes, what it did behind the one that was right
        longest is the last word.
        """
        right = {column: depth for depth, column in enumerate(accepted)}
        agreed: list[int] = []  # for each column, the accepted tokens that it continues
        for column, parent in enumerate(tree.parents):
            agreed.append(right.get(column, agreed[parent] if parent >= 0 else -1))
        start = self.view.position
        places, skipped = tree.positions.tolist(), {*accepted, *tried}
        heard: dict[tuple[int, int], list[int]] = {}  # by what they continue
        for column in sorted(range(len(places)), key=agreed.__getitem__):
            if places[column] >= start and column not in skipped:
                heard.setdefault((places[column], tree.parents[column]), []).append(column)
        for (position, _), columns in heard.items():
            self.proposal.overhear(position, checked.subset(columns))

    def settle(self) -> None:
        """Look again at a doubtful position, with the prefix in the row and nothing else of value behind it."""
        is_doubted, self._is_doubted = self._is_doubted, False
        decision = self._rule.after_doubt(self._tried) if is_doubted else None
        if decision is not None:
            self._queued = decision.token_ids

    def _conclude(self) -> None:
        decision = self._rule.at_the_end(self._tried)
        if isinstance(decision, Retry):
            self._queued = decision.token_ids
        else:
            self.miss = decision

    def _accept(self, best: Outcome) -> None:
        """Write down the evidence for a token, and begin the next position."""
        view, tried = self.view, self._tried
        limit, rivals = view.check.limit(view.position), tried.rivals(best.token_id)
        if rivals and view.check.is_coarse(view.position):
            own = view.check.own_limit(view.prefix, best.token_id)
            if best.distance <= own < limit:  # its own noise tells it from tokens that the coarse tolerance does not
                limit, rivals = own, [(i, d) for i, d in rivals if d <= own + view.check.noise]
        if any(evidence.rivals for evidence in self.evidence):
            rivals = tried.rivals(best.token_id, within=_BEHIND_RIVALS * view.check.limit(view.position))
        self.accepted_by_noise |= not best.fits
        self.evidence.append(
            PositionEvidence(
                token_id=best.token_id,
                token=view.lm.decode([best.token_id]),
                distance=best.distance,
                tolerance=limit,
                runner_up=tried.runner_up(best.token_id),
                n_checked=tried.n_checked,
                rivals=named(view.lm, rivals),
            )
        )
        if self.fork is not None and view.position == self.fork.position + 1:
            self.next_ids = (best.token_id, *(i for i in tried.nearest(_NEXT) if i != best.token_id))
        elif rivals and not view.check.is_independent:
            ids, distances = zip((best.token_id, best.distance), *tried.rivals(best.token_id), strict=True)
            self.fork = Fork(position=view.position, token_ids=torch.tensor(ids), distances=torch.tensor(distances))
        self.proposal.settle(best.token_id)
        view.prefix.append(best.token_id)
        self._begin()

    def _begin(self) -> None:
        self._tried = Trials(self.view.lm.vocab_size)
        self._rule.begin()
        self._queued = torch.empty(0, dtype=torch.long)
        self._size = _FIRST_BATCH
        if not self.is_done and not self._is_at_hole:
            self.proposal.begin()
