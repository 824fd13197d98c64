"""Capture at scale: last-token states of many prompts at many layers, resumable, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sipit.collisions.states import MAX_TOKENS, OnStep, finite_states, last_states
from sipit.collisions.store import StateFolder, StateWriter, prompts_sha256
from sipit.errors import OptionError
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.workers import Here, Workers

SHARD_PROMPTS = 2048


def capture_states(
    lm: LanguageModel,
    prompts: Sequence[Tensor],
    cuts: Sequence[Cut],
    folder: Path | str,
    *,
    source: dict[str, Any] | None = None,
    shard_prompts: int = SHARD_PROMPTS,
    max_tokens: int = MAX_TOKENS,
    workers: Workers | None = None,
    on_step: OnStep | None = None,
) -> StateFolder:
    """Write the last-token states of all prompts at all cuts, in one pass; return the folder.

    Interrupted, it goes on where it stopped when called again with the same arguments; shards that
    went missing or were cut short since are made anew. Memory is bounded by one shard.

    Args:
        lm: the model.
        prompts: token ids, each at least one token; of equal prompts the first is kept.
        cuts: (layer, site) pairs.
        folder: made where it is not there.
        source: where the prompts come from, for the record.
        shard_prompts: prompts in one file.
        max_tokens: run at once.
        workers: who runs the prompts, a shard at a time; None: this process.
        on_step: told the prompts captured and in all.

    Raises:
        StorageError: the folder cannot be written, or is full.
        MismatchError: it holds another capture.
        NonFiniteError: the model's states overflow.
    """
    kept = without_repeats(prompts)
    if not kept or not cuts:
        raise OptionError("a capture needs at least one prompt and one layer")
    writer = StateWriter(
        folder,
        lm,
        cuts,
        n_prompts=len(kept),
        sha256=prompts_sha256(kept),
        shard_size=shard_prompts,
        source={**(source or {}), "n_repeats_dropped": len(prompts) - len(kept)},
    )
    parts = [kept[start : start + shard_prompts] for start in range(0, len(kept), shard_prompts)]
    missing = [number for number in range(len(parts)) if number not in writer]
    found = (workers or Here(lm)).results(_captured, [(parts[number], tuple(cuts), max_tokens) for number in missing])
    n_done = len(kept) - sum(len(parts[number]) for number in missing)
    for number, states in zip(missing, found, strict=True):
        writer.write(number, parts[number], finite_states(cuts, states, first=number * shard_prompts))
        n_done += len(parts[number])
        if on_step is not None:
            on_step(n_done, len(kept))
    return writer.finish()


def _captured(lm: LanguageModel, piece: tuple[Sequence[Tensor], Sequence[Cut], int]) -> list[Tensor]:
    """Return the last states of a shard's prompts at some cuts, so many tokens at once."""
    prompts, cuts, max_tokens = piece
    return last_states(lm, prompts, cuts, max_tokens=max_tokens)


def without_repeats(prompts: Sequence[Tensor]) -> list[Tensor]:
    """Return the prompts, of those with the same token ids only the first."""
    first: dict[tuple[int, ...], Tensor] = {}
    for ids in prompts:
        first.setdefault(tuple(ids.tolist()), ids)
    return list(first.values())
