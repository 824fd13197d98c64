"""Models built so that prompts collide, and models that come close to it: what `constructed` searches.

Each function builds one kind. Prompts are drawn from the seed; the search is not told which collide.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from sipit.models import LanguageModel
from sipit.models.families import family_of, module_at
from sipit.observations import Cut

Expected = Literal["collides", "does not"]
MIN_VOCAB = 128  # tokens
LENGTH = 60  # tokens of the prompts that differ at one early place

_VOCAB = MIN_VOCAB
_WIDTH = 32
_SHAPE: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": _WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that what a prompt holds early on matters to its last state
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_FLOAT16_MAX = 65504.0
_SHIFT = 8.0  # well above every state of the tiny OPT
_CLIPPED = 0.999  # share of absolute values an activation grid spans; the rest saturates


@dataclass(frozen=True, kw_only=True)
class Construction:
    """A model, the prompts to search among, and what should follow."""

    name: str
    what: str
    expected: Expected
    lm: LanguageModel
    prompts: list[Tensor]  # no two the same
    cut: Cut


def constructions_on(base: LanguageModel, seed: int) -> tuple[Callable[[], list[Construction]], ...]:
    """Return what builds each kind, to be called one at a time so that one kind's models are held at a time."""
    return (
        lambda: _control(base, seed),
        lambda: _equal_rows(base, seed),
        lambda: _constant_positions(seed),
        lambda: _repeated_token(seed),
        lambda: _relu(seed),
        lambda: _rounded_states(base, seed),
        lambda: _float16(seed),
    )


def tiny_llama(seed: int) -> LanguageModel:
    """Return a tiny random Llama in float64."""
    return _tiny(LlamaConfig(**_SHAPE, intermediate_size=48), seed=seed, name="tiny llama")


def _control(base: LanguageModel, seed: int) -> list[Construction]:
    what = "a model left as it is; prompts that differ in one early token"
    prompts = _one_place(base.vocab_size, 3, seed)
    return [
        Construction(
            name=f"control, layer {n}", what=what, expected="does not", lm=base, prompts=prompts, cut=Cut(n, "block")
        )
        for n in (1, base.n_layers)
    ]


def _equal_rows(base: LanguageModel, seed: int) -> list[Construction]:
    what = "two vocabulary rows hold the same embedding, so prompts that differ in nothing else have equal states"
    model = copy.deepcopy(base.model)
    prompts = _one_place(base.vocab_size, 3, seed)
    first, second = (int(prompts[i][3]) for i in (5, 17))
    rows = cast(Any, model).get_input_embeddings().weight.data
    rows[second] = rows[first]
    lm = LanguageModel(model, base.tokenizer, name=f"{base.name}, two equal rows")
    return [
        Construction(
            name=f"equal rows, layer {n}", what=what, expected="collides", lm=lm, prompts=prompts, cut=Cut(n, "block")
        )
        for n in (1, base.n_layers)
    ]


def _constant_positions(seed: int) -> list[Construction]:
    """Learned positions made equal: the first block sees a set of tokens; the causal mask orders them for the next."""

    def flatten(model: Any) -> None:
        model.transformer.wpe.weight.data[:] = model.transformer.wpe.weight.data[0]

    lm = _tiny(GPT2Config(**_SHAPE), seed=seed, name="tiny gpt2, equal positions", change=flatten)
    untouched = _tiny(GPT2Config(**_SHAPE), seed=seed, name="tiny gpt2")
    ids = _distinct(_VOCAB, 5, seed)
    orders = [torch.cat([ids[list(order)], ids[4:]]) for order in permutations(range(4))]
    runs = [ids[:1].repeat(n) for n in range(1, 13)]
    same = "all position embeddings are equal; "
    return [
        Construction(
            name="equal positions, reordered prefix, layer 1",
            what=same + "the last token attends to a set of embeddings, whose order nothing tells",
            expected="collides",
            lm=lm,
            prompts=orders,
            cut=Cut(1, "block"),
        ),
        Construction(
            name="equal positions, reordered prefix, layer 2",
            what=same + "yet each earlier state depends on the tokens before it, so the causal mask tells the order",
            expected="does not",
            lm=lm,
            prompts=orders,
            cut=Cut(2, "block"),
        ),
        Construction(
            name="equal positions, one token repeated, layer 3",
            what=same + "an average of equal values is that value, however many they are, at every layer",
            expected="collides",
            lm=lm,
            prompts=runs,
            cut=Cut(3, "block"),
        ),
        Construction(
            name="learned positions, one token repeated, layer 3",
            what="position embeddings as drawn: each count has its own last position",
            expected="does not",
            lm=untouched,
            prompts=runs,
            cut=Cut(3, "block"),
        ),
    ]


def _repeated_token(seed: int) -> list[Construction]:
    lm = tiny_llama(seed)
    ids = _distinct(_VOCAB, 2, seed)
    rotary = "nothing altered: rotary positions turn queries and keys but not values, "
    return [
        Construction(
            name="rotary positions, one token repeated",
            what=rotary + "and an average of equal values is that value: every count gives the same state",
            expected="collides",
            lm=lm,
            prompts=[ids[:1].repeat(n) for n in range(1, 13)],
            cut=Cut(3, "block"),
        ),
        Construction(
            name="rotary positions, one token repeated behind another",
            what=rotary + "but the values differ once another token, such as a BOS, comes first",
            expected="does not",
            lm=lm,
            prompts=[torch.cat([ids[1:], ids[:1].repeat(n)]) for n in range(1, 13)],
            cut=Cut(3, "block"),
        ),
    ]


def _relu(seed: int) -> list[Construction]:
    config = OPTConfig(**_SHAPE, ffn_dim=48, word_embed_proj_dim=_WIDTH)

    def dead(model: Any) -> None:
        for block in model.model.decoder.layers:
            block.fc1.bias.data.fill_(-1e3)

    def on_stream(activation: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
        return lambda model: _alter_states(model, lambda states, _: activation(states - _SHIFT))

    prompts = _one_place(_VOCAB, 3, seed)
    rows: tuple[tuple[str, str, Expected, Callable[[Any], None]], ...] = (
        (
            "ReLU, every unit of the MLPs dead",
            "biases far below zero silence the MLPs; the residual stream carries the prompt past them",
            "does not",
            dead,
        ),
        (
            "ReLU on the stream itself, dead",
            "each block's output goes through ReLU(x - 8), with no way around it: zeros for an open set of weights",
            "collides",
            on_stream(torch.relu),
        ),
        (
            "the same with an analytic activation",
            "softplus(x - 8) in its place is small but never constant: differences shrink, and stay",
            "does not",
            on_stream(nn.functional.softplus),
        ),
    )
    return [
        Construction(
            name=name,
            what=what,
            expected=expected,
            lm=_tiny(config, seed=seed, name=f"tiny opt, {name}", change=change),
            prompts=prompts,
            cut=Cut(1, "block"),
        )
        for name, what, expected, change in rows
    ]


def _rounded_states(base: LanguageModel, seed: int) -> list[Construction]:
    prompts = _one_place(base.vocab_size, 3, seed)
    layers = list(range(1, base.n_layers + 1))
    captured = base.tapped([Cut(n, "block") for n in layers]).states(torch.stack(prompts[:32]))
    tops = [float(_quantile(states.abs().flatten(), _CLIPPED)) for states in captured]
    builds = []
    for bits in (8, 4):
        levels = 2 ** (bits - 1) - 1

        def rounded(states: Tensor, block: int, levels: int = levels) -> Tensor:
            step = tops[block] / levels
            return (states / step).round().clamp(-levels, levels) * step

        model = copy.deepcopy(base.model)
        _alter_states(model, rounded)
        lm = LanguageModel(model, base.tokenizer, name=f"{base.name}, states of {bits} bits")
        what = (
            f"states rounded behind each block to {bits} bits on one symmetric grid a block, which spans 99.9 % of "
            "their values; prompts that differ in one early token"
        )
        expected: Expected = "collides" if bits == 4 else "does not"
        builds.append(
            Construction(
                name=f"states of {bits} bits, layer 1",
                what=what,
                expected=expected,
                lm=lm,
                prompts=prompts,
                cut=Cut(1, "block"),
            )
        )
    return builds


def _float16(seed: int) -> list[Construction]:
    config = LlamaConfig(**_SHAPE, intermediate_size=48)
    prompts = _one_place(_VOCAB, 3, seed)

    def saturate(model: Any) -> None:
        mlp = model.model.layers[0].mlp
        mlp.up_proj.weight.data *= 1e3
        mlp.down_proj.weight.data *= 1e4
        _alter_states(model, lambda states, _: states.nan_to_num(0.0).clamp(-_FLOAT16_MAX, _FLOAT16_MAX))

    name = "float16, overflow"
    lm = _tiny(config, seed=seed, name=f"tiny llama, {name}", dtype=torch.float16)
    shared = {*prompts[0][:3].tolist(), *prompts[0][4:].tolist()}
    heavy = [token for token in (int(ids[3]) for ids in prompts) if token not in shared][:2]
    cast(Any, lm.model).model.embed_tokens.weight.data[heavy] *= 1e6  # now: the check at load refuses infinite states
    overflow = Construction(
        name=name,
        what="two rows overflow when cast to float16: states that saw them are not finite, which is no collision",
        expected="does not",
        lm=lm,
        prompts=prompts,
        cut=Cut(1, "block"),
    )
    name = "float16, overflow clamped"
    clamped = Construction(
        name=name,
        what="the first MLP overflows in float16 and is clamped to ±65,504: only signs are left of most values",
        expected="collides",
        lm=_tiny(config, seed=seed, name=f"tiny llama, {name}", change=saturate, dtype=torch.float16),
        prompts=prompts,
        cut=Cut(1, "block"),
    )
    return [overflow, clamped]


def _tiny(
    config: Any,
    *,
    seed: int,
    name: str,
    change: Callable[[Any], None] | None = None,
    dtype: torch.dtype = torch.float64,
) -> LanguageModel:
    """Return a random model of a config, changed and then cast."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    if change is not None:
        change(model)
    return LanguageModel(model.to(dtype), name=name)


def _alter_states(model: nn.Module, change: Callable[[Tensor, int], Tensor]) -> None:
    """Pass what each block of a model gives on through `change(states, number of the block)`.

    A forward hook would come too late: the hub library records hidden states before hooks run.
    """
    family = family_of(model)
    for number, block in enumerate(cast(nn.ModuleList, getattr(module_at(model, family.trunk), family.blocks))):

        def altered(*args: Any, own: Any = block.forward, number: int = number, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            if isinstance(output, tuple):
                return (change(output[0], number), *output[1:])
            return change(output, number)

        block.__dict__["forward"] = altered


def _one_place(vocab_size: int, place: int, seed: int) -> list[Tensor]:
    """Return 96 prompts that differ in the token at one place."""
    tail = torch.randint(vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(seed))
    tokens = _distinct(vocab_size, 96, seed)
    return [torch.cat([tail[:place], token[None], tail[place + 1 :]]) for token in tokens]


def _distinct(vocab_size: int, n: int, seed: int) -> Tensor:
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:n]


def _quantile(values: Tensor, share: float) -> Tensor:
    return values.float().sort().values[int(share * (len(values) - 1))]
