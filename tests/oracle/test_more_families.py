"""Families that have no row of their own in the table, against the library's own full forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2Config,
    DeepseekV3Config,
    FalconConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    Olmo3Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

import sipit
from sipit import LanguageModel
from sipit.errors import ModelError, OptionError
from tests.tiny_models import random_ids

WINDOW = 4
IDS = random_ids(11, seed=21)
_SHAPE: dict[str, Any] = {
    "vocab_size": 150,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    **_SHAPE,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_TURNS = ["sliding_attention", "full_attention"] * 2
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}

_HEADS: dict[str, Any] = {**_SHAPE, "head_dim": 8}
_WINDOWS: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": _TURNS}
_FEW_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SMALL_GPT: dict[str, Any] = {
    "vocab_size": 150,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 256,
    "initializer_range": 0.25,
}
_GEMMA4: dict[str, Any] = {
    **_HEADS,
    **_WINDOWS,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LLAMA4: dict[str, Any] = {
    **_HEADS,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}

# name → (model type, its config), of families that are laid out like one of the table's rows
BY_TYPE: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", _SHAPE),
    "arcee": ("arcee", _SHAPE),
    "codegen": ("codegen", {**_SMALL_GPT, "n_ctx": 256, "rotary_dim": 8}),
    "cohere": ("cohere", _SHAPE),
    "deepseek_v2": ("deepseek_v2", {**_SHAPE, "num_key_value_heads": 4, **_LATENT, "topk_method": "greedy"}),
    "diffllama": ("diffllama", _SHAPE),
    "ernie4_5": ("ernie4_5", _HEADS),
    "exaone4": ("exaone4", {**_HEADS, **_WINDOWS}),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", {**_HEADS, **_WINDOWS, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", {**_HEADS, **_WINDOWS, "query_pre_attn_scalar": 8}),
    "gemma4_text": ("gemma4_text", _GEMMA4),
    "glm": ("glm", _HEADS),
    "glm4_moe": (
        "glm4_moe",
        {**_HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1},
    ),
    "gpt_bigcode": ("gpt_bigcode", _SMALL_GPT),
    "gptj": ("gptj", {**_SMALL_GPT, "rotary_dim": 8}),
    "granitemoe": ("granitemoe", {**_SHAPE, **_FEW_EXPERTS}),
    "helium": ("helium", _HEADS),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEADS),
    "llama4_text, chunks of 4": ("llama4_text", {**_LLAMA4, "attention_chunk_size": WINDOW}),
    "ministral": ("ministral", {**_HEADS, **_WINDOWS}),
    "ministral3": ("ministral3", {**_HEADS, "sliding_window": WINDOW}),
    "mistral": ("mistral", {**_SHAPE, "sliding_window": WINDOW}),
    "mixtral, windows": ("mixtral", {**_SHAPE, **_FEW_EXPERTS, "sliding_window": WINDOW}),
    "nemotron": ("nemotron", _SHAPE),
    "olmo": ("olmo", _SHAPE),
    "olmo2": ("olmo2", _SHAPE),
    "olmoe": ("olmoe", {**_SHAPE, "num_experts": 4, "num_experts_per_tok": 2}),
    "phi3, windows": ("phi3", {**_SHAPE, "sliding_window": WINDOW}),
    "phimoe": ("phimoe", {**_SHAPE, **_FEW_EXPERTS, "sliding_window": None}),
    "qwen2, windows": (
        "qwen2",
        {**_SHAPE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3, windows": (
        "qwen3",
        {**_HEADS, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "seed_oss": ("seed_oss", _HEADS),
    "starcoder2": ("starcoder2", {**_SHAPE, "sliding_window": WINDOW}),
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "falcon": lambda: FalconConfig(**_SHAPE, alibi=False),
    "stablelm": lambda: StableLmConfig(**_SHAPE),
    "granite": lambda: GraniteConfig(**_SHAPE),
    "smollm3": lambda: SmolLM3Config(**_SHAPE),
    "olmo3": lambda: Olmo3Config(**_SHAPE, sliding_window=WINDOW, layer_types=_TURNS),
    "gpt_oss": lambda: GptOssConfig(
        **_SHAPE,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=_TURNS,
    ),
    "deepseek_v3": lambda: DeepseekV3Config(**{**_SHAPE, "num_key_value_heads": 4}, **_LATENT),
    "qwen3_moe": lambda: Qwen3MoeConfig(**{**_EXPERTS, "head_dim": 8}),
    "glm4": lambda: Glm4Config(**_SHAPE, head_dim=8),
    "cohere2": lambda: Cohere2Config(**_SHAPE, sliding_window=WINDOW, layer_types=_TURNS),
    "qwen2_moe": lambda: Qwen2MoeConfig(**_EXPERTS),  # its window is 0, which means none
    "qwen2_moe, windows past the last block": lambda: Qwen2MoeConfig(
        **_EXPERTS, use_sliding_window=True, sliding_window=WINDOW
    ),
}


# As above, of families that a packed pass cannot compute, or that are laid out like no row
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "biogpt": ("biogpt", {k: v for k, v in _SHAPE.items() if k != "pad_token_id"}),
    "bloom": ("bloom", {"vocab_size": 150, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "falcon, alibi": ("falcon", {**_SHAPE, "alibi": True}),
    "gemma3n_text": (
        "gemma3n_text",
        {
            **_HEADS,
            **_WINDOWS,
            "laurel_rank": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 150,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": None,
        },
    ),
    "gemma4_text, keys shared": (
        "gemma4_text",
        {**_GEMMA4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 150},
    ),
    "jamba": ("jamba", {**_SHAPE, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "lfm2": ("lfm2", {**_SHAPE, "full_attn_idxs": [1, 3]}),
    "mamba": ("mamba", {"vocab_size": 150, "hidden_size": 32, "num_hidden_layers": 4}),
    "mamba2": (
        "mamba2",
        {
            "vocab_size": 150,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 16,
        },
    ),
    "minimax": (
        "minimax",
        {**_HEADS, **_FEW_EXPERTS, "layer_types": ["full_attention", "linear_attention"] * 2, "block_size": 4},
    ),
    "mpt": ("mpt", {"vocab_size": 150, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 256}),
    "persimmon": ("persimmon", _SHAPE),
    "phi": ("phi", _SHAPE),
    "qwen3_5_text": ("qwen3_5_text", {**_HEADS, **_LINEAR}),
    "qwen3_next": ("qwen3_next", {**_EXPERTS, "head_dim": 8, **_LINEAR}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "vocab_size": 150,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "lru_width": 32,
        },
    ),
    "rwkv": ("rwkv", {"vocab_size": 150, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4}),
    "xglm": ("xglm", {"vocab_size": 150, "d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48}),
}


def _of_type(kind: str, given: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval()


@pytest.mark.parametrize("family", BY_TYPE)
def test_families_laid_out_like_others_are_inverted_exactly(family: str) -> None:
    model = _of_type(*BY_TYPE[family])
    with torch.no_grad():
        states = model(input_ids=IDS[None], output_hidden_states=True, use_cache=False).hidden_states
    lm = LanguageModel(model, name=family)
    assert sipit.invert(lm, states[2][0], layer=2).input_ids == tuple(IDS.tolist())
    assert sipit.invert(lm, states[4][0], site="final").input_ids == tuple(IDS.tolist())


@pytest.mark.filterwarnings("ignore")  # of the library's own slow paths
@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_inverted_are_refused_at_load(family: str) -> None:
    model = _of_type(*REFUSED[family])
    with pytest.raises(ModelError, match="layout"):
        LanguageModel(model, name=family)


@pytest.mark.parametrize(
    ("kind", "text", "vision"), [("gemma3", "gemma3_text", "siglip_vision_model"), ("mistral3", "mistral", "pixtral")]
)
def test_the_text_part_of_a_model_that_takes_images_is_inverted_exactly(kind: str, text: str, vision: str) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        kind,
        text_config={**_HEADS, "sliding_window": WINDOW, "model_type": text},
        vision_config={**small, "image_size": 16, "patch_size": 4, "model_type": vision},
        image_token_index=149,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        states = model(input_ids=IDS[None], output_hidden_states=True, use_cache=False).hidden_states
    lm = LanguageModel(model, name=kind)
    assert sipit.invert(lm, states[2][0], layer=2).input_ids == tuple(IDS.tolist())
    assert sipit.invert(lm, states[4][0], site="final").input_ids == tuple(IDS.tolist())


@pytest.mark.thorough
@pytest.mark.parametrize("length", [63, 64, 65, 80])
def test_chunked_attention_is_exact_on_both_sides_of_a_chunks_end(length: int) -> None:
    model, ids = _of_type("llama4_text", {**_LLAMA4, "attention_chunk_size": 64}), random_ids(length, seed=3)
    with torch.no_grad():
        states = model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
    found = sipit.invert(LanguageModel(model), states[3][0], layer=3)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(ids.tolist()))


def test_a_row_too_long_for_the_scale_of_llama4s_queries_is_refused() -> None:
    model = _of_type("llama4_text", {**_LLAMA4, "attention_chunk_size": 64, "floor_scale": 160})
    lm = LanguageModel(model)
    with pytest.raises(OptionError, match="shorter prompt"):
        sipit.invert(lm, lm.capture(input_ids=random_ids(170, seed=3), layer=2))


@pytest.mark.parametrize("family", [name for name, (_, given) in BY_TYPE.items() if given.get("sliding_window")])
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_prefixes_on_both_sides_of_a_windows_length_are_inverted_exactly(family: str, length: int) -> None:
    model = _of_type(*BY_TYPE[family])
    with torch.no_grad():
        states = model(input_ids=IDS[None], output_hidden_states=True, use_cache=False).hidden_states
    found = sipit.invert(LanguageModel(model), states[2][0, :length], layer=2)
    assert found.input_ids == tuple(IDS[:length].tolist())


@pytest.mark.parametrize("family", CONFIGS)
def test_states_of_the_librarys_own_pass_are_inverted_exactly(family: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        states = model(input_ids=IDS[None], output_hidden_states=True, use_cache=False).hidden_states
    lm = LanguageModel(model, name=family)
    assert sipit.invert(lm, states[2][0], layer=2).input_ids == tuple(IDS.tolist())
    assert sipit.invert(lm, states[4][0], site="final").input_ids == tuple(IDS.tolist())
