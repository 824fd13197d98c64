"""Where prompt networks are kept: beside the fitted inverses of the same model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sipit.inversion.inverses.prompt_network import PromptNetwork
from sipit.inversion.inverses.store import fit_folder
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.storage import open_tensors, whole_file

_FORMAT = "sipit.prompt_network"
_VERSION = "1"
_SHAPE = ("max_tokens", "d_hidden", "n_blocks")


@dataclass(frozen=True, kw_only=True)
class PromptFit:
    """A prompt network of one model at one layer and site."""

    network: PromptNetwork
    report: dict[str, Any]  # what it was trained on, how well it reads held-out prompts, seconds


def prompt_fit_path(lm: LanguageModel, cut: Cut) -> Path:
    """Return the file of one prompt network."""
    return fit_folder(lm) / f"last-{cut.site}-{cut.layer}.safetensors"


def save_prompt_fit(lm: LanguageModel, cut: Cut, fit: PromptFit) -> Path:
    """Write a prompt network, whole or not at all; weights in float16.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    path = prompt_fit_path(lm, cut)
    network = fit.network
    tensors = {name: value.half().contiguous().cpu() for name, value in network.state_dict().items()}
    metadata = {"format": _FORMAT, "version": _VERSION, "fingerprint": lm.fingerprint, "report": json.dumps(fit.report)}
    metadata |= {name: str(getattr(network, name)) for name in _SHAPE}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path


def load_prompt_fit(lm: LanguageModel, cut: Cut) -> PromptFit | None:
    """Return the prompt network of a cut, or None where there is none that can be used.

    A stale or damaged file is passed over: what it proposes is checked, so its absence costs time alone.
    """
    path = prompt_fit_path(lm, cut)
    try:
        with open_tensors(path) as stream:
            metadata = stream.metadata() or {}
            known = (metadata.get("format"), metadata.get("version"), metadata.get("fingerprint"))
            if known != (_FORMAT, _VERSION, lm.fingerprint):
                return None
            weights = {key: stream.get_tensor(key).float() for key in stream.keys()}  # noqa: SIM118
        shape = {name: int(metadata[name]) for name in _SHAPE}
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            return None
        d_state, d_key = weights["linear"].shape[1:]
        network = PromptNetwork(d_state, d_key, lm.vocab_size, **shape)
        network.load_state_dict(weights)
        report = json.loads(metadata["report"])
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError):
        return None
    return PromptFit(network=network.to(lm.device).eval().requires_grad_(False), report=report)
