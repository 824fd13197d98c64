"""Rotary embeddings that change with the length of the whole pass, held as they are at one length.

The library changes them in the caller's model while it runs, and what a long pass leaves there changes
a later short one. Here every pass goes through copies: reset as in a fresh model, then frozen.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sipit.models.shallow import rewritten

_BY_LENGTH = ("dynamic", "longrope")  # rope types whose angles transformers makes anew for longer passes


def switch_length(config: Any) -> int | None:
    """Return the most tokens a pass may have before its states depend on how many there are.

    None where no length does. Up to it a state follows from its prefix alone; beyond it the angles at
    every position are other ones, of a short prefix too.
    """
    lengths = []
    for rope in _by_length(config):
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        most = int(config.max_position_embeddings)
        lengths.append(min(int(original), most) if original else most)
    return min(lengths, default=None)


def regime(config: Any, seq_len: int | None) -> int:
    """Return a length whose passes have the same angles as those of `seq_len` tokens; 0 for the short ones.

    None is a short pass.
    """
    switch = switch_length(config)
    if switch is None or seq_len is None or seq_len <= switch:
        return 0
    ropes = _by_length(config)
    return switch + 1 if len(ropes) == 1 and ropes[0]["rope_type"] == "longrope" else seq_len


def fresh(module: nn.Module) -> nn.Module:
    """Return a shallow copy whose rotary embeddings are as in a model that has run nothing yet."""
    return rewritten(module, lambda part: _reset(part) if _changes(part) else part)


def frozen(module: nn.Module, seq_len: int) -> nn.Module:
    """Return a shallow copy whose rotary embeddings are those of a pass of `seq_len` tokens, at whatever length."""
    return rewritten(module, lambda part: _frozen(part, seq_len) if _changes(part) else part)


def _by_length(config: Any) -> list[dict[str, Any]]:
    given = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in given.values() if isinstance(part, dict)]  # one a kind of attention layer
    return [rope for rope in nested or [given] if rope.get("rope_type") in _BY_LENGTH]


def _kinds(rotary: Any) -> dict[str, str]:
    """Return the rope type by the kind of attention layer; the kind is "" where there is one for all."""
    return dict(rotary.rope_type) if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}


def _changes(part: nn.Module) -> bool:
    has_type = isinstance(getattr(part, "rope_type", None), str | dict) and hasattr(part, "original_max_seq_len")
    return has_type and any(name in _BY_LENGTH for name in _kinds(part).values())


@torch.no_grad()
def _reset(rotary: Any) -> Any:
    made = copy.copy(rotary)
    made.__dict__["_buffers"] = {k: None if v is None else v.clone() for k, v in rotary._buffers.items()}
    made.max_seq_len_cached = made.original_max_seq_len
    for kind in _kinds(rotary):
        prefix = f"{kind}_" if kind else ""
        if hasattr(made, f"{prefix}max_seq_len_cached"):
            setattr(made, f"{prefix}max_seq_len_cached", made.original_max_seq_len)
        original: Tensor = getattr(made, f"{prefix}original_inv_freq")
        made._buffers[f"{prefix}inv_freq"] = original.to(rotary._buffers[f"{prefix}inv_freq"].device).clone()
    return made


@torch.no_grad()
def _frozen(rotary: Any, seq_len: int) -> Any:
    """Return a copy in which a pass of this length has been run, and whose type says that nothing changes it."""
    made = _reset(rotary)
    for kind in _kinds(rotary):
        place = made._buffers[f"{kind}_inv_freq" if kind else "inv_freq"]
        row, places = torch.zeros(1, 1, device=place.device), torch.arange(max(1, seq_len), device=place.device)
        made(row, places[None], **({"layer_type": kind} if kind else {}))
    made.rope_type = dict.fromkeys(_kinds(rotary), "default") if isinstance(rotary.rope_type, dict) else "default"
    ropes = getattr(made.config, "rope_parameters", None) or {}
    if "long_mscale" in ropes:  # Phi-3.5-MoE looks at the length once more, for the scale of its angles' sines
        is_long = seq_len > ropes["original_max_position_embeddings"]
        scale = ropes["long_mscale" if is_long else "short_mscale"]
        made.config = copy.copy(made.config)
        made.config.rope_parameters = {**ropes, "long_mscale": scale, "short_mscale": scale}
    return made
