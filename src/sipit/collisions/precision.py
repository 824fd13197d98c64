"""Does rounding the weights bring states together? Closest pairs per precision, with the scale taken out.

Two kinds. Weight-only and simulated: every linear map inside the blocks of a copy of the model is
rounded, its values are held as floats in the model's own dtype, and all arithmetic stays in that dtype;
what activations lose in a quantised kernel is not measured. And real: the same maps held and multiplied
by bitsandbytes ("bnb-int8" and so on). Embeddings, norms and biases are left as they are.

The states of a rounded model may be longer, and their distances larger for that alone; hence each
distance is also given relative to the mean norm and to the median distance.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sipit.collisions.scales import THRESHOLD, closeness, ratio
from sipit.collisions.states import OnStep, last_states
from sipit.errors import OptionError
from sipit.models import LanguageModel
from sipit.models.families import family_of, module_at
from sipit.models.quantized import dequantized_copy, is_quantized, quantized_copy, quantizer_named
from sipit.observations import Cut, Site

Precision = Literal[
    "float32", "bfloat16", "float16", "int8", "int4", "bnb-int8", "bnb-int8-vectorwise", "bnb-nf4", "bnb-fp4"
]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_LEVELS = {"int8": 127, "int4": 7}  # largest code of the symmetric grid; the lowest code is not used
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PrecisionResult:
    """The closest pair of states under one precision of the weights, at one cut."""

    precision: Precision  # of the linear weights inside the blocks
    layer: int
    site: Site
    n_prompts: int
    n_pairs: int  # of prompts with finite states
    n_not_finite: int  # prompts whose state holds NaN or infinity; they take no part
    n_equal: int  # pairs of states equal in every value
    n_collisions: int  # pairs at or below the threshold, the equal ones included
    threshold: float  # L2
    weight_error: float  # ‖rounded − given‖ / ‖given‖ over the weights rounded
    mean_norm: float | None  # of the states
    median_distance: float | None  # of the pairs
    median_is_exact: bool  # over all pairs, not over a seeded sample of them
    distance: float | None  # L2 of the closest pair; None without a pair
    relative_to_norm: float | None
    relative_to_median: float | None
    first: int | None  # the closest pair: numbers of its prompts
    second: int | None


def precision_survey(
    lm: LanguageModel,
    prompts: Sequence[Tensor],
    cuts: Sequence[Cut],
    *,
    precisions: Sequence[Precision] = ("float32", "bfloat16", "int8", "int4"),
    threshold: float = THRESHOLD,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[PrecisionResult]:
    """Return the closest pair of last-token states under each precision of the weights and at each cut.

    Args:
        lm: the model; a copy is rounded, one precision at a time.
        prompts: token ids, no two the same. N of (T,)
        cuts: (layer, site) pairs.
        precisions: in the order wanted. "float32" rounds nothing in a float32 model.
        threshold: largest L2 distance counted as a collision.
        seed: of the sample of pairs the median is taken from, above 2,000 prompts.
        on_step: told the prompts done and in all, over all precisions.

    Raises:
        OptionError: a precision is unknown, or two prompts are the same.
    """
    if len({tuple(ids.tolist()) for ids in prompts}) < len(prompts):
        raise OptionError("two prompts have the same token ids, so they would collide; pass each prompt once")
    total = len(precisions) * len(prompts)
    results = []
    for number, precision in enumerate(precisions):

        def step(n: int, _: int, before: int = number * len(prompts)) -> None:
            if on_step is not None:
                on_step(before + n, total)

        rounded, error = with_rounded_weights(lm, precision)
        captured = last_states(rounded, prompts, cuts, on_step=step)
        for states, (layer, site) in zip(captured, cuts, strict=True):
            found = closeness(states, threshold=threshold, seed=seed)
            closest = found.pairs[0] if found.pairs else None
            distance = closest.distance if closest else None
            results.append(
                PrecisionResult(
                    precision=precision,
                    layer=layer,
                    site=site,
                    n_prompts=len(prompts),
                    n_pairs=found.n_pairs,
                    n_not_finite=found.n_not_finite,
                    n_equal=found.n_equal,
                    n_collisions=found.n_collisions,
                    threshold=threshold,
                    weight_error=error,
                    mean_norm=found.mean_norm,
                    median_distance=found.median_distance,
                    median_is_exact=found.median_is_exact,
                    distance=distance,
                    relative_to_norm=None if distance is None else ratio(distance, found.mean_norm),
                    relative_to_median=None if distance is None else ratio(distance, found.median_distance),
                    first=closest.first if closest else None,
                    second=closest.second if closest else None,
                )
            )
    return results


def with_rounded_weights(lm: LanguageModel, precision: Precision) -> tuple[LanguageModel, float]:
    """Return a copy of the model with rounded linear weights inside its blocks, and their relative error.

    Raises:
        OptionError: the precision is unknown or needs a package that is absent, or the model is quantised already.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"precision {precision!r} is unknown; choose from {', '.join(PRECISIONS)}")
    if is_quantized(lm.model):
        raise OptionError(f"model {lm.name!r} holds quantised weights already; pass it without quantize")
    name = f"{lm.name} {precision}"
    if precision.startswith("bnb-"):
        quantizer = quantizer_named(precision.removeprefix("bnb-"))
        made, error = quantized_copy(lm.model, _blocks(lm.model), quantizer)
        return LanguageModel(made, lm.tokenizer, name=name), error
    model = copy.deepcopy(lm.model)
    error = size = 0.0
    for weight, outputs in _linear_weights(model):
        rounded = rounded_weight(weight, precision, outputs=outputs)
        error += float((rounded.double() - weight.double()).square().sum())
        size += float(weight.double().square().sum())
        weight.copy_(rounded)
    return LanguageModel(model, lm.tokenizer, name=name), (error / size) ** 0.5 if size else 0.0


def rounded_weight(weight: Tensor, precision: Precision, *, outputs: int = 0) -> Tensor:
    """Return a matrix rounded to a precision, in its own dtype.

    int8 and int4: each output channel has its own symmetric grid, which spans its largest absolute
    value in 127 or 7 equal steps to either side.

    Args:
        weight: of a linear map, two-dimensional.
        precision: see above.
        outputs: the dimension that counts output channels.
    """
    if precision in _DTYPES:
        return weight.to(_DTYPES[precision]).to(weight.dtype)
    levels = _LEVELS[precision]
    step = weight.abs().amax(dim=1 - outputs, keepdim=True) / levels
    codes = (weight / step.masked_fill(step == 0, 1.0)).round().clamp(-levels, levels)
    return codes * step


@torch.no_grad()
def in_float64(lm: LanguageModel) -> LanguageModel:
    """Return the same weights in float64: a copy, twice the memory of the float32 model.

    Quantised weights become the values their codes mean; of an int8 model this copy rounds no activation.
    """
    twin = dequantized_copy(lm.model) if is_quantized(lm.model) else copy.deepcopy(lm.model)
    return LanguageModel(twin.double(), lm.tokenizer, name=f"{lm.name} in float64")


def float64_distances(wide: LanguageModel, pairs: Sequence[tuple[Tensor, Tensor]], cut: Cut) -> list[float]:
    """Return the distances of pairs of prompts in a model of float64 weights, one prompt at a time.

    Tells a collision in exact arithmetic from a close pair: the distance of the former falls with the
    precision, about 1e-9-fold from float32, the latter's stays. Parts a model computes in float32
    whatever its dtype (most RMS norms) keep the distance from falling further.

    Args:
        wide: as `in_float64` made it.
        pairs: token ids of two prompts each.
        cut: (layer, site).
    """
    model = wide.cut(cut)
    return [float((model.ordinary(a)[-1].double() - model.ordinary(b)[-1].double()).norm()) for a, b in pairs]


def _linear_weights(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Yield the weight of each linear map inside the blocks, and which of its dimensions counts outputs."""
    for module in _blocks(model).modules():
        if isinstance(module, nn.Linear):
            yield module.weight.detach(), 0
        elif isinstance(module, Conv1D):  # GPT-2 keeps its weights as (inputs, outputs)
            yield module.weight.detach(), 1


def _blocks(model: nn.Module) -> nn.Module:
    family = family_of(model)
    return cast(nn.Module, getattr(module_at(model, family.trunk), family.blocks))
