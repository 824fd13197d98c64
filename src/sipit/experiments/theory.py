"""The theory made visible: random initialisation, training, the witnesses against it, and one repeated token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sipit.collisions import constructed_cases, nearest_pairs
from sipit.collisions.constructed import ConstructedCase
from sipit.corpora import library_prose
from sipit.experiments.experiment import Experiment, Setting, Task, Values
from sipit.models.families import FAMILIES

_ANALYTIC = ("gelu", "silu", "swish", "tanh", "sigmoid", "quick_gelu")  # and their variants, as names begin
_VOCAB, _WIDTH, _LENGTH = 64, 32, 6
_DENSITIES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "normal 0.02": lambda like, draw: 0.02 * torch.randn(like.shape, generator=draw, dtype=like.dtype),
    "normal 0.2": lambda like, draw: 0.2 * torch.randn(like.shape, generator=draw, dtype=like.dtype),
    "uniform 0.05": lambda like, draw: 0.1 * torch.rand(like.shape, generator=draw, dtype=like.dtype) - 0.05,
}
_OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "GD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adam, weight decay, tied": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
}


def _model(family: str, *, tied: bool = False) -> Any:
    """Return a tiny model in float64, where no rounding can make two states equal."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if family == "gpt2":
        config = GPT2Config(
            vocab_size=_VOCAB,
            n_embd=_WIDTH,
            n_layer=2,
            n_head=4,
            n_positions=64,
            tie_word_embeddings=tied,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config).double()
    llama = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(llama).double()


@torch.no_grad()
def _least(model: Any, prompts: Tensor) -> Values:
    """Return the closest pair of last states of prompts. (N, T)."""
    states = model(prompts, output_hidden_states=True).hidden_states[-1][:, -1]  # (N, D)
    (pair,) = nearest_pairs([states])
    return {"least": pair.distance, "median_norm": float(states.norm(dim=1).median()), "n_prompts": len(states)}


def _prompts(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn: Tensor = torch.randint(_VOCAB, (2 * n, _LENGTH), generator=generator).unique(dim=0)
    return drawn[:n]


def _initialisation(setting: Setting) -> Iterator[Task]:
    n_seeds, n_prompts = setting.of_scale(1, 5, 20), setting.of_scale(100, 1000, 10_000)
    for family in ("gpt2", "llama"):
        for density, drawn in _DENSITIES.items():
            for seed in range(n_seeds):

                def made(family: str = family, drawn: Any = drawn, density: str = density, seed: int = seed) -> Values:
                    model, draw = _model(family), torch.Generator().manual_seed(seed)
                    with torch.no_grad():
                        for parameter in model.parameters():
                            if parameter.ndim > 1:
                                parameter.copy_(drawn(parameter, draw))
                    found = _least(model.eval(), _prompts(n_prompts, seed))
                    return {"family": family, "density": density, "seed": seed, **found}

                yield Task(key=f"{family}, {density}, seed {seed}", make=made)


def _training(setting: Setting) -> Iterator[Task]:
    n_steps, n_prompts = setting.of_scale(4, 200, 5000), setting.of_scale(100, 1000, 10_000)
    for name, made_by in _OPTIMISERS.items():

        def made(name: str = name, made_by: Any = made_by) -> Values:
            with torch.random.fork_rng():
                torch.manual_seed(setting.seed)
                model = _model("llama", tied="tied" in name)
            ids, draw, path = _text_ids(), torch.Generator().manual_seed(setting.seed), []
            optimiser, prompts = made_by(model.parameters()), _prompts(n_prompts, setting.seed)
            for step in range(n_steps + 1):
                if step % max(1, n_steps // 10) == 0:
                    path.append({"step": step, **_least(model.eval(), prompts)})
                starts = torch.arange(16) * 40 if name == "GD" else torch.randint(len(ids) - 33, (16,), generator=draw)
                batch = torch.stack([ids[start : start + 32] for start in starts.tolist()])
                loss = model.train()(batch, labels=batch).loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return {
                "optimiser": name,
                "path": path,
                "loss": float(loss.detach()),
                "least": min(p["least"] for p in path),
            }

        yield Task(key=name, make=made)


def _text_ids() -> Tensor:
    text = " ".join(islice(library_prose(seed=3), 40)).encode("utf-8")
    return torch.tensor(list(text), dtype=torch.long) % _VOCAB


def _witnesses(setting: Setting) -> Iterator[Task]:
    found = cache(lambda: {case.name: case for case in constructed_cases(seed=setting.seed)})

    def made() -> Values:
        cases: list[ConstructedCase] = list(found().values())
        return {"cases": [asdict(case) for case in cases], "as_expected": sum(map(_is_as_expected, cases))}

    yield Task(key="all", make=made)


def _is_as_expected(case: ConstructedCase) -> bool:
    return case.found == (case.expected == "collides")


def _repeated(setting: Setting) -> Iterator[Task]:
    """Compare prompts that repeat one token n and n + 1 times: attention averages equal values, rotary or not."""
    for family in ("llama", "gpt2"):

        def made(family: str = family) -> Values:
            with torch.random.fork_rng():
                torch.manual_seed(setting.seed)
                model = _model(family).eval()
            gaps, alone = [], []
            with torch.no_grad():
                for token in range(8):
                    ids = torch.full((1, 12), token)
                    states = model(ids, output_hidden_states=True).hidden_states[-1][0]  # (T, D)
                    gaps.append(float((states[1:] - states[:-1]).norm(dim=1).max()))
                    other = torch.cat([torch.full((1, 1), (token + 1) % _VOCAB), ids], dim=1)
                    behind = model(other, output_hidden_states=True).hidden_states[-1][0, 1:]
                    alone.append(float((behind[1:] - behind[:-1]).norm(dim=1).min()))
            return {"family": family, "largest_gap": max(gaps), "least_gap_behind_another_token": min(alone)}

        yield Task(key=family, make=made)


def _activations(_: Setting) -> Iterator[Task]:
    """Read each family's activation from its configuration's defaults: one model of it may have another."""
    from transformers import AutoConfig

    def made(family: str) -> Values:
        config: Any = AutoConfig.for_model(family).get_text_config()
        names = ("hidden_act", "activation_function", "hidden_activation")
        name = next(str(found) for found in (getattr(config, key, None) for key in names) if found)
        routed = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        return {"activation": name, "is_analytic": name.startswith(_ANALYTIC), "is_routed": bool(routed)}

    for family in FAMILIES:
        yield Task(key=family, make=partial(made, family))


_SELF_MADE: dict[str, Any] = {"needs_tokenizer": False, "uses_model": False}

INITIALISATION = Experiment(
    name="initialisation",
    answers="Theorem 2.2",
    claim="at random initialisation two different prompts collide with probability 0",
    paper="proved for any density of the parameters",
    tasks=_initialisation,
    **_SELF_MADE,
)
TRAINING = Experiment(
    name="training",
    answers="Theorem 2.3 and its corollaries",
    claim="finitely many steps of GD and SGD keep different prompts apart; Adam, decay and tying are not covered",
    paper="proved for GD and SGD with step sizes in (0, 1)",
    tasks=_training,
    **_SELF_MADE,
)
WITNESSES = Experiment(
    name="witnesses",
    answers="section 2, where it does not hold",
    claim="equal rows, equal positions, non-analytic parts and rounding make prompts collide on purpose",
    paper="named as the exceptions",
    tasks=_witnesses,
    **_SELF_MADE,
)
ACTIVATIONS = Experiment(
    name="activations",
    answers="Appendix F",
    claim="the families in use have analytic activations, so the theorems speak of them",
    paper="GELU, SiLU, SwiGLU and GeGLU are analytic; ReLU is not",
    tasks=_activations,
    **_SELF_MADE,
)
REPEATED = Experiment(
    name="repeated-token",
    answers="beside Theorem 2.2",
    claim="with rotary positions and no BOS, prompts that repeat one token have one state whatever their length",
    paper="not in the paper: with relative positions the prompt's length leaves no trace in equal values",
    tasks=_repeated,
    **_SELF_MADE,
)
