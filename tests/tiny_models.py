"""Tiny random models of every family, a tiny tokenizer, and the ordinary forward pass they are judged by."""

from __future__ import annotations

import copy
import hashlib
from functools import reduce
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sipit import LanguageModel

N_LAYERS = 4
VOCAB = 150
WINDOW = 4  # shorter than every prompt used with it

# Large random weights, so that attention and its windows matter to the states.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_TURNS = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)

# family → (path of the module after the last block, config)
_FAMILIES: dict[str, tuple[str, Any]] = {
    "gpt2": ("transformer.ln_f", lambda: GPT2Config(**_SHAPE, n_positions=256)),
    "gpt_neo": (
        "transformer.ln_f",
        lambda: GPTNeoConfig(
            **{**_SHAPE, "num_layers": N_LAYERS, "num_heads": 4},
            attention_types=[[["global", "local"], N_LAYERS // 2]],
            window_size=WINDOW,
        ),
    ),
    "llama": ("model.norm", lambda: LlamaConfig(**_GROUPED)),
    "mistral": ("model.norm", lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW)),
    "phi3": ("model.norm", lambda: Phi3Config(**_GROUPED)),
    "gemma3_text": ("model.norm", lambda: Gemma3TextConfig(**_GEMMA, layer_types=_TURNS)),
    "qwen2": ("model.norm", lambda: Qwen2Config(**_GROUPED)),
    "qwen3": ("model.norm", lambda: Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma2": ("model.norm", lambda: Gemma2Config(**_GEMMA, layer_types=_TURNS)),
    "gpt_neox": ("gpt_neox.final_layer_norm", lambda: GPTNeoXConfig(**_SHAPE)),
    "opt": ("model.decoder.final_layer_norm", lambda: OPTConfig(**_SHAPE, ffn_dim=48, word_embed_proj_dim=32)),
    "olmo2": ("model.norm", lambda: Olmo2Config(**_GROUPED)),
    "mixtral": (
        "model.norm",
        lambda: MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Return a random causal LM of a family, in eval mode; `overrides` are set on its config."""
    config = _FAMILIES[family][1]()
    for name, value in overrides.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def embedding_rows(model: Any) -> Tensor:
    """Return the embedding table itself, to be edited in place. (V, D)."""
    table: Tensor = model.get_input_embeddings().weight.data
    return table


def twin_model(family: str, first: int, second: int, *, gap: float = 0.0, seed: int = 0) -> Any:
    """Return a model in which two tokens have the same embedding, or nearly: `gap` is in units of the row's norm."""
    model = tiny_model(family, seed=seed)
    rows = embedding_rows(model)
    rows[second] = rows[first]
    rows[second, 0] += gap * float(rows[first].norm())
    return model


def blocks_of(model: Any) -> list[nn.Module]:
    """Return the blocks, found by their number and not by the package's table."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == N_LAYERS]
    return list(lists[0])


@torch.no_grad()
def true_states(model: Any, family: str, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """Return the states of prompts by the library's own full forward pass: (layer, site) → (B, T, D) or (T, D)."""
    after = reduce(getattr, _FAMILIES[family][0].split("."), model)
    last: list[Tensor] = []
    hook = after.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0].clone()))
    try:
        rows = ids if ids.ndim == 2 else ids[None]
        output = model(input_ids=rows, output_hidden_states=True, use_cache=False)
    finally:
        hook.remove()
    states: dict[tuple[int, str], Tensor] = {(layer, "block"): output.hidden_states[layer] for layer in range(N_LAYERS)}
    states[(N_LAYERS, "block")] = last[0]
    states[(N_LAYERS, "final")] = output.hidden_states[N_LAYERS]
    return states if ids.ndim == 2 else {key: value[0] for key, value in states.items()}


def random_ids(length: int, *, seed: int, vocab_size: int = VOCAB) -> Tensor:
    """Return uniformly drawn token ids. (T,)."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def weights_digest(model: nn.Module) -> str:
    """Return one digest of every weight and buffer."""
    digest = hashlib.sha256()
    for name, value in sorted({**model.state_dict(), **dict(model.named_buffers())}.items()):
        digest.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def byte_tokenizer(*, bos: bool = True, chat: bool = True) -> Any:
    """Return a byte-level BPE without merges: 256 bytes, then the special tokens <s> and <e>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": 256, "<e>": 257}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "<e>"])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<e>")
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}<e>\n{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
        )
    return tokenizer


def text_model(*, bos: bool = True, chat: bool = True, name: str = "tiny-text", layers: int = 3) -> LanguageModel:
    """Return a tiny Llama over bytes, with a tokenizer."""
    model = tiny_model("llama", seed=5, vocab_size=260, num_hidden_layers=layers)
    return LanguageModel(model, byte_tokenizer(bos=bos, chat=chat), name=name)


def copy_of(model: Any) -> Any:
    """Return a deep copy of a model, to be damaged."""
    return copy.deepcopy(model)
