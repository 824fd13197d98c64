"""Families that have no row of their own in the table, against the library's own full forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
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
