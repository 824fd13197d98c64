"""A closed-form inverse from states to tokens, from a few thousand random tokens and some prose run once.

No training: the states of these tokens (anchors) and their embeddings give a ridge regression, in a kernel's space,
from state to token key. Random tokens cover the vocabulary, prose shows tokens among their like. It is weak
beside a fitted inverse and costs seconds instead of minutes. The first position, whose states have
extreme norms and no context, has a linear regression of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sipit.corpora import library_prose
from sipit.errors import StorageError
from sipit.inversion.inverses.kernel_regression import KernelRegression, kernel_regression
from sipit.inversion.inverses.restored import restored
from sipit.inversion.inverses.ridge import Ridge, ridge
from sipit.inversion.inverses.sampled_ids import spread_ids
from sipit.inversion.inverses.sinks import alternative_kind, are_sink_like, sink_cosine
from sipit.inversion.inverses.token_keys import TokenKeys, token_keys
from sipit.inversion.judging.meter import Meter
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.storage import cache_dir, open_tensors, whole_file

_PROMPTS = ((16, 112), (64, 4))  # number and length of the anchor prompts; the short ones for early positions
_PROSE = (16, 112)  # of prompts of prose, where there is a tokenizer
_PACKAGES = ("argparse", "collections", "datetime", "logging", "statistics")  # whose docstrings are the prose
_BATCH = 512  # tokens run at once
_FORMAT, _VERSION = "sipit.anchors", "3"  # the version is raised with the keys and the recipe
_PARTS = {
    "first": ("mean", "scale", "weight", "bias"),
    "rest": ("mean", "scale", "anchors", "coefficients", "bias"),
}
_FIRSTS = 256  # anchors of the first position


@dataclass(frozen=True, kw_only=True)
class RidgeInverse:
    """Scores for every token from one observed state."""

    keys: TokenKeys
    first: Ridge
    rest: KernelRegression
    sink_cosine: float  # states nearer than this to the mean first state are read as first ones
    block_tokens: int  # what the anchors cost
    doubtful_weights: tuple[float, float] = (50.0, 1.0)
    echo_reach: float = 0.2
    weights: tuple[tuple[float, float], ...] = (
        *((25.0, 0.65), (25.0, 1.0), (50.0, 1.0), (100.0, 1.0), (200.0, 1.0)),
        *((25.0, 0.0), (50.0, 0.0), (100.0, 0.0), (200.0, 0.0)),
    )

    def queries_at(self, observed: Tensor, positions: Tensor, states: Tensor) -> Tensor:
        """Return the queries of states, were they the prompt's at some positions. (T, D), (N,), (N, D) → (N, K)."""
        states, is_first = states.float(), self.are_first(observed, positions)
        return torch.where(is_first[:, None], self.first(states), self.rest(states))

    def lengths(self, observed: Tensor, positions: Tensor) -> Tensor:
        """Return by what a token's key is multiplied in the query wanted at some positions. (T, D), (N,) → (N, 1)."""
        return observed.new_ones(len(positions), 1, dtype=torch.float32)

    def are_first(self, observed: Tensor, positions: Tensor) -> Tensor:
        """Return which positions are read as first ones. (T, D), (N,) → (N,) bool."""
        return are_sink_like(observed, positions, self.first.mean, self.sink_cosine)

    def features(self, states: Tensor) -> Tensor:
        """Return standardised states, as the kernel of the later positions compares them. (N, D) → (N, D)."""
        return self.rest.standardised(states)

    def other_query(self, observed: Tensor, position: int) -> Tensor | None:
        """Return the query by the other regression where a state may be of the other kind. (T, D) → (K,)."""
        kind = alternative_kind(observed, position, self.first.mean, self.sink_cosine)
        if kind is None:
            return None
        return (self.first if kind == "first" else self.rest)(observed[position][None].float())[0]

    def scores(self, queries: Tensor) -> Tensor:
        """Return the cosine of each query with every token's key. (N, K) → (N, V)."""
        return self.keys.scores(queries)


def ridge_inverse(lm: LanguageModel, cut: Cut, meter: Meter) -> RidgeInverse:
    """Return the anchors' inverse of a cut, made once; the search that needs it first pays for it."""

    def made() -> RidgeInverse:
        known = _kept(lm, cut)
        if known is not None:
            return known
        inverse = _fit(lm, cut)
        meter.block_tokens += inverse.block_tokens
        _keep(lm, cut, inverse)
        return inverse

    return lm.derived(("ridge inverse", cut), made)


def _fit(lm: LanguageModel, cut: Cut) -> RidgeInverse:
    generator = torch.Generator().manual_seed(1)
    keys = token_keys(lm)
    model = lm.cut(cut)
    read = restored(lm, cut).rows
    states, tokens, spent = [], [], 0
    for ids in _anchor_prompts(lm, generator):
        length = ids.shape[1]
        for batch in ids.split(max(1, _BATCH // length)):
            values = model.ordinary_batch(batch)[:, 1:].flatten(0, 1).float()
            states.append(read(values, torch.arange(1, length).repeat(len(batch))))
            tokens.append(batch[:, 1:].flatten())
        spent += ids.numel()
    firsts = spread_ids(lm.vocab_size, _FIRSTS, generator)
    alone = model.row().run(firsts, torch.zeros_like(firsts)).float()  # (N, D)
    alone = read(alone, torch.zeros_like(firsts))
    return RidgeInverse(
        keys=keys,
        first=ridge(alone, keys.keys(firsts), strength=1e-3),
        rest=kernel_regression(torch.cat(states), keys.keys(torch.cat(tokens))),
        sink_cosine=sink_cosine(alone, torch.cat(states)),
        block_tokens=(spent + len(firsts)) * cut.layer,
    )


def _anchor_prompts(lm: LanguageModel, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield token ids of anchor prompts of one length each. (N, T)."""
    for n_prompts, wanted in _PROMPTS:
        length = min(wanted, lm.max_positions or wanted)
        yield spread_ids(lm.vocab_size, n_prompts * length, generator).view(n_prompts, length)
    if lm.tokenizer is not None:
        n_prompts, wanted = _PROSE
        length = min(wanted, lm.max_positions or wanted)
        ids = lm.encode("\n\n".join(library_prose(only=_PACKAGES)))[: n_prompts * length]
        yield ids[: len(ids) // length * length].view(-1, length)


def _path(lm: LanguageModel, cut: Cut) -> Path:
    folder = cache_dir() / "anchors" / lm.fingerprint.removeprefix("sha256:")[:16]
    return folder / f"{cut.site}-{cut.layer}-{str(lm.dtype).removeprefix('torch.')}.safetensors"


def _keep(lm: LanguageModel, cut: Cut, inverse: RidgeInverse) -> None:
    """Write an inverse for the next process, where the cache directory can be written."""
    tensors = {
        f"{name}.{key}": getattr(getattr(inverse, name), key).float().cpu().contiguous()
        for name, keys in _PARTS.items()
        for key in keys
    }
    numbers = {"sink_cosine": repr(inverse.sink_cosine), "block_tokens": str(inverse.block_tokens)}
    path = _path(lm, cut)
    with contextlib.suppress(StorageError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            metadata = {"format": _FORMAT, "version": _VERSION, "fingerprint": lm.fingerprint, **numbers}
            save_file(tensors, temporary, metadata=metadata)


def _kept(lm: LanguageModel, cut: Cut) -> RidgeInverse | None:
    """Return the inverse that an earlier process made; a file that cannot be used is passed over: it only orders."""
    try:
        with open_tensors(_path(lm, cut)) as stream:
            metadata = stream.metadata() or {}
            known = (metadata.get("format"), metadata.get("version"), metadata.get("fingerprint"))
            if known != (_FORMAT, _VERSION, lm.fingerprint):
                return None
            tensors = {name: stream.get_tensor(name).to(lm.device) for name in stream.keys()}  # noqa: SIM118
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            return None
        parts = {name: {key: tensors[f"{name}.{key}"] for key in keys} for name, keys in _PARTS.items()}
        first, rest = Ridge(**parts["first"]), KernelRegression(**parts["rest"])
        sink, spent = float(metadata["sink_cosine"]), int(metadata["block_tokens"])
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError):
        return None
    keys = token_keys(lm)
    width, d_key = first.weight.shape
    is_whole = rest.anchors.shape == (len(rest.coefficients), width) and rest.coefficients.shape[1] == d_key
    if d_key != keys.width or not is_whole:
        return None
    return RidgeInverse(keys=keys, first=first, rest=rest, sink_cosine=sink, block_tokens=spent)
