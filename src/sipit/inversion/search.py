"""Recover a prompt position by position: a proposal orders candidates, the packed check decides.

No token is accepted because a proposal liked it, and a vocabulary without a match ends the search
with the prefix kept and the miss described.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sipit.errors import MismatchError, OptionError, ShapeError
from sipit.inversion.check import Checked, PackedCheck
from sipit.inversion.proposals import Hinted, Proposal, Scene, proposal_for
from sipit.inversion.result import Candidate, Inversion, Meter, Miss, PositionEvidence, Verdict
from sipit.inversion.tolerance import noise_floor, tolerance_for
from sipit.inversion.tree import Tree, grow, pass_price
from sipit.models import LanguageModel
from sipit.observations import Observation

_FIRST_BATCH = 16
_GROWTH = 4
_STANDS_OUT = 16.0  # a token this many times nearer than all others is worth a second look
_AMPLIFIED = 256.0  # at most this many tolerances away
_MAX_RIVALS = 16  # tokens that fit as well, named in the evidence of one position


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a running search stands."""

    seq_len: int
    input_ids: tuple[int, ...]  # accepted so far
    n_checked: int
    block_tokens: int
    seconds: float


OnProgress = Callable[[Progress], None]


def search(
    lm: LanguageModel,
    seen: Observation,
    *,
    policy: str = "auto",
    noise: float = 0.0,
    exhaustive: bool = False,
    max_batch: int = 256,
    seed: int = 0,
    use_fit: bool = True,
    hint: Sequence[int] = (),
    on_progress: OnProgress | None = None,
) -> Inversion:
    """Invert one observation; see `sipit.invert` for the arguments."""
    _check_fit(lm, seen)
    if max_batch < 1:
        raise OptionError(f"max_batch is {max_batch}; a packed pass needs at least 1 candidate")
    if not 0 <= noise < float("inf"):
        raise OptionError(f"noise is {noise}; it is a finite L2 distance, 0 or more")
    started = time.perf_counter()
    tolerance = tolerance_for(lm, seen)
    meter = Meter()
    check = PackedCheck(lm, seen, tolerance, meter, noise=noise)
    if any(not 0 <= token_id < lm.vocab_size for token_id in hint):
        raise OptionError(f"hint holds a token id outside the vocabulary (0 to {lm.vocab_size - 1})")
    generator = torch.Generator().manual_seed(seed)
    scene = Scene(lm=lm, seen=seen, check=check, meter=meter, generator=generator)
    proposal = proposal_for(policy, scene, use_fit=use_fit)
    if len(hint):
        proposal = Hinted(scene, proposal, hint)
    run = _Run(
        scene=scene,
        proposal=proposal,
        exhaustive=exhaustive,
        max_batch=max_batch,
    )
    while run.miss is None and scene.position < seen.seq_len:
        run.advance()
        if on_progress is not None:
            on_progress(
                Progress(
                    seq_len=seen.seq_len,
                    input_ids=tuple(scene.prefix),
                    n_checked=meter.n_checked,
                    block_tokens=meter.block_tokens,
                    seconds=time.perf_counter() - started,
                )
            )
    return Inversion(
        model=lm.name,
        fingerprint=lm.fingerprint,
        layer=seen.layer,
        site=seen.site,
        policy=policy,
        verdict=run.verdict(),
        text=lm.decode(scene.prefix),
        input_ids=tuple(scene.prefix),
        seq_len=seen.seq_len,
        tolerance=float(tolerance.total.max()),
        noise=noise,
        seconds=time.perf_counter() - started,
        block_tokens=meter.block_tokens,
        prefill_ratio=meter.block_tokens / (seen.seq_len * max(seen.layer, 1)),
        calibration_block_tokens=noise_floor(lm, seen.layer, seen.site).block_tokens,
        n_checked=meter.n_checked,
        observation=seen.digest(),
        dtype=seen.dtype,
        model_dtype=str(lm.dtype).removeprefix("torch."),
        positions=tuple(run.evidence),
        miss=run.miss,
    )


def _check_fit(lm: LanguageModel, seen: Observation) -> None:
    """Refuse an observation that cannot have come from this model."""
    lm.checked_layer(seen.layer, seen.site)
    width = lm.width(seen.site)
    if seen.d_model != width:
        raise ShapeError(
            f"states are {seen.d_model} wide, but site {seen.site!r} of model {lm.name!r} is {width} wide; "
            "name the model they were captured from"
        )
    if seen.fingerprint is not None and seen.fingerprint != lm.fingerprint:
        raise MismatchError(
            f"the states come from the model {seen.model!r} with fingerprint {seen.fingerprint[:19]}…, but "
            f"{lm.name!r} in {lm.dtype} has {lm.fingerprint[:19]}…; load that model in the dtype it was captured "
            "in, or drop the fingerprint from the observation to try anyway"
        )
    if lm.max_positions is not None and seen.seq_len > lm.max_positions:
        raise ShapeError(
            f"the observation has {seen.seq_len} positions, model {lm.name!r} only {lm.max_positions}; "
            "name the model the states were captured from"
        )
    if not seen.is_complete:
        raise MismatchError(
            f"the states start at or skip positions ({seen.seq_len} rows up to position {seen.positions[-1]}); "
            "this version needs every position from 0 on"
        )


@dataclass
class _Run:
    """One search under way."""

    scene: Scene
    proposal: Proposal
    exhaustive: bool
    max_batch: int
    evidence: list[PositionEvidence] = field(default_factory=list)
    miss: Miss | None = None
    accepted_by_noise: bool = False
    _tried: _Tried = field(init=False)
    _doubted: set[int] = field(init=False)  # tokens whose own noise was measured
    _size: int = field(init=False)
    _certain: Tensor = field(init=False)  # a token that fits, to be run with its twins

    def __post_init__(self) -> None:
        self._begin()

    def verdict(self) -> Verdict:
        if self.miss is not None:
            return "unmatched"
        if self.accepted_by_noise or any(p.rivals for p in self.evidence):
            return "ambiguous"
        return "recovered"

    def advance(self) -> None:
        """Run one packed pass: candidates for the next position, and guesses behind the best of them."""
        batch = self._certain
        if len(batch) == 0:
            limit = min(self._size, self.max_batch, self.proposal.batch_limit or self.max_batch)
            batch = self.proposal.next(limit, self._tried.untried)
            batch = batch[self._tried.untried[batch]]  # whatever a proposal says, no token is tried twice
            self._size *= _GROWTH
        if len(batch) == 0:  # the proposal has no more: whatever it left out comes last
            batch = self._tried.untried.nonzero()[: self.max_batch, 0]
        if len(batch) == 0:
            self._conclude()
            return
        speculates = not self.exhaustive and len(self._certain) == 0
        outlook = self.proposal.outlook() if speculates else None
        tree = grow(batch, self.scene.position, outlook, self.max_batch, pass_price(self.scene.seen.seq_len))
        checked = self.scene.check.tree(tree.token_ids, tree.positions, tree.sees)
        self._walk(tree, checked)

    def _walk(self, tree: Tree, checked: Checked) -> None:
        """Accept along the tree as long as a token fits; only nodes behind accepted tokens count."""
        accepted: list[int] = []
        for level, continued in zip(tree.levels, tree.chain, strict=True):
            here = checked.subset(torch.tensor(level))
            self._tried.add(here)
            best = self._tried.best()
            if not best.is_near or (self.exhaustive and len(self._certain) == 0):
                self.proposal.learn(here)
                self._doubt(best)
                break
            twins = [t for t in self.scene.lm.embeddings.twins(best.token_id) if self._tried.untried[t]]
            if twins:  # the next pass checks them beside it, behind the same prefix
                beside = [best.token_id, *twins] if self.max_batch > 1 else twins
                self._certain = torch.tensor(beside[: self.max_batch])
                break
            if best.token_id not in here.token_ids.tolist():  # it was checked in an earlier pass
                self._certain = torch.tensor([best.token_id])
                break
            column = level[here.token_ids.tolist().index(best.token_id)]
            accepted.append(column)
            self._accept(best)
            if column != continued:
                break
        self.scene.check.accept(accepted)

    def _doubt(self, best: _Best) -> None:
        """Where one token is far nearer than all others and yet too far, measure the noise of its own state."""
        runner_up = self._tried.runner_up(best.token_id)
        limit = self.scene.check.limit(self.scene.position)
        stands_out = runner_up is not None and best.distance * _STANDS_OUT < runner_up
        if best.is_near or not stands_out or best.distance > _AMPLIFIED * limit or best.token_id in self._doubted:
            return
        self._doubted.add(best.token_id)
        self.scene.check.remeasure(self.scene.prefix, best.token_id)
        limit = self.scene.check.limit(self.scene.position)
        if best.distance <= limit:  # its own noise explains the distance: check again all that lies so near
            self._certain = self._tried.take_back(limit)[: self.max_batch]

    def _conclude(self) -> None:
        """With the whole vocabulary tried: accept the nearest token in the next pass, or describe the miss."""
        best = self._tried.best()
        if best.is_near:
            self._certain = torch.tensor([best.token_id])
            return
        self.miss = Miss(
            position=self.scene.position,
            token_id=best.token_id,
            token=self.scene.lm.decode([best.token_id]),
            distance=best.distance,
            tolerance=self.scene.check.limit(self.scene.position),
            n_checked=self._tried.n_checked,
        )

    def _accept(self, best: _Best) -> None:
        """Write down the evidence for a token, and begin the next position."""
        scene, tried = self.scene, self._tried
        self.accepted_by_noise |= not best.fits
        self.evidence.append(
            PositionEvidence(
                token_id=best.token_id,
                token=scene.lm.decode([best.token_id]),
                distance=best.distance,
                tolerance=scene.check.limit(scene.position),
                runner_up=tried.runner_up(best.token_id),
                n_checked=tried.n_checked,
                rivals=tuple(
                    Candidate(token_id=i, token=scene.lm.decode([i]), distance=d)
                    for i, d in tried.rivals(best.token_id)[:_MAX_RIVALS]
                ),
            )
        )
        self.proposal.settle(best.token_id)
        scene.prefix.append(best.token_id)
        self._begin()

    def _begin(self) -> None:
        self._tried = _Tried(self.scene.lm.vocab_size)
        self._doubted = set()
        self._certain = torch.empty(0, dtype=torch.long)
        self._size = _FIRST_BATCH
        if self.scene.position < self.scene.seen.seq_len:
            self.proposal.begin()


@dataclass(frozen=True)
class _Best:
    token_id: int
    distance: float
    fits: bool
    is_near: bool


class _Tried:
    """The candidates checked at one position."""

    def __init__(self, vocab_size: int) -> None:
        self.untried = torch.ones(vocab_size, dtype=torch.bool)  # (V,)
        self._ids: list[Tensor] = []
        self._distances: list[Tensor] = []
        self._fits: list[Tensor] = []
        self._near: list[Tensor] = []

    @property
    def n_checked(self) -> int:
        return int((~self.untried).sum())

    def add(self, checked: Checked) -> None:
        self.untried[checked.token_ids] = False
        self._ids.append(checked.token_ids.cpu())
        self._distances.append(checked.distances.cpu())
        self._fits.append(checked.fits.cpu())
        self._near.append(checked.is_near.cpu())

    def best(self) -> _Best:
        """Return the nearest token that may be accepted, else the nearest of all."""
        ids, distances, fits, near = self._all()
        among = near if bool(near.any()) else torch.ones_like(near)
        i = int(distances.masked_fill(~among, torch.inf).argmin())
        return _Best(int(ids[i]), float(distances[i]), bool(fits[i]), bool(near[i]))

    def runner_up(self, token_id: int) -> float | None:
        """Return the distance of the nearest other token checked."""
        ids, distances, _, _ = self._all()
        others = distances[ids != token_id]
        return float(others.min()) if len(others) else None

    def rivals(self, token_id: int) -> list[tuple[int, float]]:
        """Return other tokens that may be accepted too, the nearest first."""
        ids, distances, _, near = self._all()
        keep = near & (ids != token_id)
        order = distances[keep].argsort(stable=True)
        found = zip(ids[keep][order].tolist(), distances[keep][order].tolist(), strict=True)
        return [(int(i), float(d)) for i, d in found]

    def take_back(self, distance: float) -> Tensor:
        """Forget the tokens tried within a distance, as if they had not been; return them, nearest first. (N,)."""
        ids, distances, fits, near = self._all()
        far = distances > distance
        self._ids, self._distances, self._fits, self._near = [ids[far]], [distances[far]], [fits[far]], [near[far]]
        back = ids[~far][distances[~far].argsort()]
        self.untried[back] = True
        return back

    def _all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.cat(self._ids),
            torch.cat(self._distances),
            torch.cat(self._fits),
            torch.cat(self._near),
        )
