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
    for number, start in enumerate(range(0, len(kept), shard_prompts)):
        part = kept[start : start + shard_prompts]
        if number not in writer:
            states = last_states(lm, part, cuts, max_tokens=max_tokens)
            writer.write(number, part, finite_states(cuts, states, first=start))
        if on_step is not None:
            on_step(start + len(part), len(kept))
    return writer.finish()


def without_repeats(prompts: Sequence[Tensor]) -> list[Tensor]:
    """Return the prompts, of those with the same token ids only the first."""
    first: dict[tuple[int, ...], Tensor] = {}
    for ids in prompts:
        first.setdefault(tuple(ids.tolist()), ids)
    return list(first.values())
