"""Where fitted inverses are kept: the cache directory, under the fingerprint of the model they read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sipit.float64 import float64_device
from sipit.inversion.inverses.network import InverseNetwork
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.storage import cache_dir, open_tensors, whole_file

_FORMAT = "sipit.fit"
_VERSION = "4"  # raised with the keys, which a fit is made for


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted inverse of one model at one layer and site."""

    network: InverseNetwork
    first_mean: Tensor  # (D,) float64, of the states at position 0, where the model's device or the CPU holds such
    first_weight: Tensor  # (D, K) float64, from such a state to a query
    sink_cosine: float  # states nearer than this to first_mean are read as first ones
    temperature: float  # scores are divided by it, so that the softmax tells how often it is right
    likelihood_weight: float  # of the model's log-probabilities beside the scores
    report: dict[str, Any]  # held-out ranks by kind of text, cost, recipe


def fit_folder(lm: LanguageModel) -> Path:
    """Return the folder of a model's fits."""
    return cache_dir() / "fits" / lm.fingerprint.removeprefix("sha256:")[:16]


def fit_path(lm: LanguageModel, cut: Cut) -> Path:
    """Return the file of one fit."""
    return fit_folder(lm) / f"{cut.site}-{cut.layer}.safetensors"


def save_fit(lm: LanguageModel, cut: Cut, fit: Fit) -> Path:
    """Write a fit, whole or not at all; weights in float16.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    path = fit_path(lm, cut)
    tensors = {f"network.{k}": v.half().contiguous().cpu() for k, v in fit.network.state_dict().items()}
    tensors["network.bias"] = fit.network.bias.detach().float().contiguous().cpu()
    tensors |= {"first.mean": fit.first_mean.cpu(), "first.weight": fit.first_weight.float().contiguous().cpu()}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": lm.fingerprint,
        "sink_cosine": repr(fit.sink_cosine),
        "temperature": repr(fit.temperature),
        "likelihood_weight": repr(fit.likelihood_weight),
        "report": json.dumps(fit.report),
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path


def load_fit(lm: LanguageModel, cut: Cut) -> Fit | None:
    """Return the fit of a cut, or None where there is none that can be used.

    A stale or damaged file is passed over: a fit only orders candidates, so its absence costs time,
    and using a wrong one would cost no more. The last one read is remembered while its file is the same.
    """
    path = fit_path(lm, cut)
    try:
        found = path.stat()
    except OSError:
        return None
    state = path, found.st_ino, found.st_mtime_ns, found.st_size
    last: dict[tuple[Path, int, int, int], Fit | None] = lm.derived("last fit read", dict)
    if state in last:
        return last[state]
    read = _read(lm, path)
    last.clear()
    last[state] = read
    return read


def _read(lm: LanguageModel, path: Path) -> Fit | None:
    try:
        with open_tensors(path) as stream:
            metadata = stream.metadata() or {}
            known = (metadata.get("format"), metadata.get("version"), metadata.get("fingerprint"))
            if known != (_FORMAT, _VERSION, lm.fingerprint):
                return None
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        return _restored(lm, tensors, metadata)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError):
        return None


def _restored(lm: LanguageModel, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Fit:
    up, linear = tensors["network.up.weight"], tensors["network.linear.weight"]
    d_state = tensors["network.mean"].shape[0]
    network = InverseNetwork(d_state, linear.shape[0], lm.vocab_size, up.shape[0])
    weights = {k.removeprefix("network."): v.float() for k, v in tensors.items() if k.startswith("network.")}
    network.load_state_dict(weights)
    temperature, share = float(metadata["temperature"]), float(metadata["likelihood_weight"])
    is_sane = all(bool(torch.isfinite(t).all()) for t in tensors.values())
    if not (is_sane and 0 < temperature < math.inf and 0 <= share < math.inf):
        raise ValueError("the fit holds values that are not finite")
    return Fit(
        network=network.to(lm.device).eval().requires_grad_(False),
        first_mean=tensors["first.mean"].double().to(float64_device(lm.device)),
        first_weight=tensors["first.weight"].double().to(float64_device(lm.device)),
        sink_cosine=float(metadata["sink_cosine"]),
        temperature=temperature,
        likelihood_weight=share,
        report=json.loads(metadata["report"]),
    )
