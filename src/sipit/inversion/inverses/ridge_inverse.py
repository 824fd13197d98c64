"""A closed-form inverse from states to tokens, from a few thousand random tokens and some prose run once.

No training: the states of these tokens (anchors) and their embeddings give a ridge regression, in a kernel's space,
from state to token key. Random tokens cover the vocabulary, prose shows tokens among their like. It is weak
beside a fitted inverse and costs seconds instead of minutes. The first position, whose states have
extreme norms and no context, has a linear regression of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.corpora import library_prose
from sipit.inversion.inverses.kernel_regression import KernelRegression, kernel_regression
from sipit.inversion.inverses.restored import restored
from sipit.inversion.inverses.ridge import Ridge, ridge
from sipit.inversion.inverses.sampled_ids import spread_ids
from sipit.inversion.inverses.sinks import alternative_kind, are_sink_like, sink_cosine
from sipit.inversion.inverses.token_keys import TokenKeys, token_keys
from sipit.inversion.judging.meter import Meter
from sipit.models import LanguageModel
from sipit.models.kept import KeptFile, kept_tensors
from sipit.observations import Cut

_PROMPTS = ((16, 112), (64, 4))  # number and length of the anchor prompts; the short ones for early positions
_PROSE = (16, 112)  # of prompts of prose, where there is a tokenizer
_PACKAGES = ("argparse", "collections", "datetime", "logging", "statistics")  # whose docstrings are the prose
_BATCH = 512  # tokens run at once
_VERSION = 4  # raised with the keys and the recipe
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
        inverse = _fit(lm, cut)
        meter.block_tokens += inverse.block_tokens
        return inverse

    def read() -> RidgeInverse:
        file = KeptFile(kind="anchors", name=f"{cut.site}-{cut.layer}", version=_VERSION)
        return kept_tensors(lm, file, made, to_tensors=_tensors, from_tensors=lambda tensors: _of_tensors(lm, tensors))

    return lm.derived(("ridge inverse", cut), read)


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


def _tensors(inverse: RidgeInverse) -> dict[str, Tensor]:
    tensors = {
        f"{name}.{key}": getattr(getattr(inverse, name), key).float() for name, keys in _PARTS.items() for key in keys
    }
    numbers = {"sink_cosine": inverse.sink_cosine, "block_tokens": inverse.block_tokens}
    return tensors | {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}


def _of_tensors(lm: LanguageModel, tensors: dict[str, Tensor]) -> RidgeInverse | None:
    """Return the inverse that an earlier process made, or None where its tensors do not fit together."""
    parts = {name: {key: tensors[f"{name}.{key}"].to(lm.device) for key in keys} for name, keys in _PARTS.items()}
    first, rest = Ridge(**parts["first"]), KernelRegression(**parts["rest"])
    keys = token_keys(lm)
    width, d_key = first.weight.shape
    is_whole = rest.anchors.shape == (len(rest.coefficients), width) and rest.coefficients.shape[1] == d_key
    if d_key != keys.width or not is_whole:
        return None
    sink, spent = float(tensors["sink_cosine"]), int(tensors["block_tokens"])
    return RidgeInverse(keys=keys, first=first, rest=rest, sink_cosine=sink, block_tokens=spent)
