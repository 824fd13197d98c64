"""Recover a prompt position by position: a proposal orders candidates, the packed check decides.

No token is accepted because a proposal liked it, and a vocabulary without a match ends the search
with the prefix kept and the miss described.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sipit.errors import MismatchError, OptionError, ShapeError
from sipit.inversion.check import Checked, PackedCheck
from sipit.inversion.proposals import Proposal, Scene, proposal_for
from sipit.inversion.result import Candidate, Inversion, Meter, Miss, PositionEvidence, Verdict
from sipit.inversion.tolerance import noise_floor, tolerance_for
from sipit.models import LanguageModel
from sipit.observations import Observation

_FIRST_BATCH = 16
_GROWTH = 4
_MAX_RIVALS = 16  # tokens that fit as well, named in the evidence of one position


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a running search stands."""

    seq_len: int
    input_ids: tuple[int, ...]  # accepted so far
    n_checked: int
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
    on_progress: OnProgress | None = None,
) -> Inversion:
    """Invert one observation; see `sipit.invert` for the arguments."""
    _check_fit(lm, seen)
    if max_batch < 1:
        raise OptionError(f"max_batch is {max_batch}; a packed pass needs at least 1 candidate")
    if not noise >= 0:
        raise OptionError(f"noise is {noise}; it is an L2 distance, 0 or more")
    started = time.perf_counter()
    tolerance = tolerance_for(lm, seen)
    meter = Meter()
    check = PackedCheck(lm, seen, tolerance, meter, noise=noise)
    generator = torch.Generator().manual_seed(seed)
    scene = Scene(lm=lm, seen=seen, check=check, meter=meter, generator=generator)
    run = _Run(
        scene=scene,
        proposal=proposal_for(policy, scene),
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

    def verdict(self) -> Verdict:
        if self.miss is not None:
            return "unmatched"
        if self.accepted_by_noise or any(p.rivals for p in self.evidence):
            return "ambiguous"
        return "recovered"

    def advance(self) -> None:
        """Settle the next position: accept a token there, or describe the miss."""
        scene = self.scene
        tried = _Tried(scene.lm.vocab_size)
        self.proposal.begin()
        size = _FIRST_BATCH
        while True:
            limit = min(size, self.max_batch, self.proposal.batch_limit or self.max_batch)
            batch = self.proposal.next(limit, tried.untried)
            if len(batch) == 0:
                break
            checked = self._check(batch, tried)
            if bool(checked.fits.any()) and not self.exhaustive:
                break
            self.proposal.learn(checked)
            size *= _GROWTH
        self._settle(tried)

    def _check(self, batch: Tensor, tried: _Tried) -> Checked:
        checked = self.scene.check.candidates(batch)
        tried.add(checked)
        return checked

    def _settle(self, tried: _Tried) -> None:
        """Accept the nearest fitting token, after checking those that may share its embedding."""
        scene = self.scene
        best = tried.best()
        if not best.fits and best.is_near:
            self.accepted_by_noise = True
        elif not best.fits:
            self.miss = Miss(
                position=scene.position,
                token_id=best.token_id,
                token=scene.lm.decode([best.token_id]),
                distance=best.distance,
                tolerance=self._limit(),
                n_checked=tried.n_checked,
            )
            return
        twins = torch.tensor(scene.lm.embeddings.twins(best.token_id), dtype=torch.long)
        twins = twins[tried.untried[twins]][: self.max_batch]
        if len(twins):
            self._check(twins, tried)
            best = tried.best()
        self.evidence.append(
            PositionEvidence(
                token_id=best.token_id,
                token=scene.lm.decode([best.token_id]),
                distance=best.distance,
                tolerance=self._limit(),
                runner_up=tried.runner_up(best.token_id),
                n_checked=tried.n_checked,
                rivals=tuple(
                    Candidate(token_id=i, token=scene.lm.decode([i]), distance=d)
                    for i, d in tried.rivals(best.token_id)[:_MAX_RIVALS]
                ),
            )
        )
        self._append(best.token_id, tried)

    def _limit(self) -> float:
        return float(self.scene.check.limit(self.scene.position))

    def _append(self, token_id: int, tried: _Tried) -> None:
        """Move the accepted token's keys and values to the prefix; compute them if they are gone."""
        check = self.scene.check
        column = tried.column_in_last_pass(token_id)
        if column is None:
            check.candidates(torch.tensor([token_id]))
            column = 0
        check.accept([column])
        self.scene.prefix.append(token_id)


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
        return sum(len(ids) for ids in self._ids)

    def add(self, checked: Checked) -> None:
        self.untried[checked.token_ids] = False
        self._ids.append(checked.token_ids.cpu())
        self._distances.append(checked.distances.cpu())
        self._fits.append(checked.fits.cpu())
        self._near.append(checked.is_near.cpu())

    def best(self) -> _Best:
        """Return the nearest token that fits, else the nearest of all."""
        ids, distances, fits, near = self._all()
        among = fits if bool(fits.any()) else torch.ones_like(fits)
        i = int(distances.masked_fill(~among, float("inf")).argmin())
        return _Best(int(ids[i]), float(distances[i]), bool(fits[i]), bool(near[i]))

    def runner_up(self, token_id: int) -> float | None:
        """Return the distance of the nearest other token checked."""
        ids, distances, _, _ = self._all()
        others = distances[ids != token_id]
        return float(others.min()) if len(others) else None

    def rivals(self, token_id: int) -> list[tuple[int, float]]:
        """Return other tokens that fit too, the nearest first."""
        ids, distances, fits, _ = self._all()
        keep = fits & (ids != token_id)
        order = distances[keep].argsort(stable=True)
        found = zip(ids[keep][order].tolist(), distances[keep][order].tolist(), strict=True)
        return [(int(i), float(d)) for i, d in found]

    def column_in_last_pass(self, token_id: int) -> int | None:
        """Return where the token stood in the last packed pass; None if it was in an earlier one."""
        found = (self._ids[-1] == token_id).nonzero()
        return int(found[0, 0]) if len(found) else None

    def _all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.cat(self._ids),
            torch.cat(self._distances),
            torch.cat(self._fits),
            torch.cat(self._near),
        )
