"""Capture at scale: last-token states of many prompts at many layers, resumable, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sipit.collisions.states import MAX_TOKENS, Cut, OnStep, finite_states, last_states
from sipit.collisions.store import (
    FORMAT,
    VERSION,
    StateFolder,
    cut_name,
    prompts_sha256,
    whole_shards,
    write_manifest,
    write_shard,
)
from sipit.errors import OptionError
from sipit.models import LanguageModel

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
    path = Path(folder)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "cuts": [cut_name(cut) for cut in cuts],
        "n_prompts": len(kept),
        "n_repeats_dropped": len(prompts) - len(kept),
        "prompts_sha256": prompts_sha256(kept),
        "shard_size": shard_prompts,
        "source": source or {},
        "shards": [],
    }
    shards = whole_shards(path, manifest)
    for number, start in enumerate(range(0, len(kept), shard_prompts)):
        part = kept[start : start + shard_prompts]
        if number not in shards:
            states = finite_states(cuts, last_states(lm, part, cuts, max_tokens=max_tokens), first=start)
            named = {cut_name(cut): rows for cut, rows in zip(cuts, states, strict=True)}
            shards[number] = write_shard(path, number, part, named)
            manifest["shards"] = [asdict(shards[i]) for i in sorted(shards)]
            write_manifest(path, manifest)
        if on_step is not None:
            on_step(start + len(part), len(kept))
    manifest["shards"] = [asdict(shards[i]) for i in sorted(shards)]
    write_manifest(path, manifest)
    return StateFolder(path)


def without_repeats(prompts: Sequence[Tensor]) -> list[Tensor]:
    """Return the prompts, of those with the same token ids only the first."""
    first: dict[tuple[int, ...], Tensor] = {}
    for ids in prompts:
        first.setdefault(tuple(ids.tolist()), ids)
    return list(first.values())
