"""Models that no row of the table names: recovered or refused, never wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    GPTJConfig,
    GraniteConfig,
    MptConfig,
    Phi3Config,
    StableLmConfig,
    Starcoder2Config,
)

import sipit
from sipit import LanguageModel, SipitError
from sipit.observations import Cut
from tests.tiny_models import tiny_model, true_states

_SHAPE: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_WIDE: dict[str, Any] = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
LAYOUTS: dict[str, Any] = {
    "bloom": lambda: BloomConfig(**_SHAPE),  # ALiBi: no position ids to pack by
    "cohere": lambda: CohereConfig(**_WIDE),
    "falcon": lambda: FalconConfig(**_SHAPE),
    "falcon with ALiBi": lambda: FalconConfig(**_SHAPE, alibi=True),
    "gptj": lambda: GPTJConfig(
        vocab_size=90, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=256, initializer_range=0.25
    ),
    "granite": lambda: GraniteConfig(**_WIDE, embedding_multiplier=7.0, residual_multiplier=0.3, logits_scaling=4.0),
    "mpt": lambda: MptConfig(vocab_size=90, d_model=32, n_layers=3, n_heads=4, initializer_range=0.25),
    "phi3 with a window": lambda: Phi3Config(**_WIDE, sliding_window=4),
    "stablelm": lambda: StableLmConfig(**_WIDE),
    "starcoder2": lambda: Starcoder2Config(**_WIDE, sliding_window=4),
}
IDS = [5, 60, 7, 7, 89, 0, 31, 44]


@pytest.mark.filterwarnings("ignore")  # some layouts of the library warn about themselves
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layout_is_recovered_or_refused_but_never_wrong(layout: str, layer: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = AutoModelForCausalLM.from_config(LAYOUTS[layout]()).eval()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states[layer][0]
    try:
        found = sipit.invert(LanguageModel(model, name=layout), states, layer=layer, policy="likely")
    except SipitError:
        return
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS))


def test_opt_with_projections_is_recovered_behind_them() -> None:
    """OPT-350m projects out after the last block: site final is narrower than d_model."""
    model = tiny_model("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    lm = LanguageModel(model, name="opt")
    assert (lm.width(Cut(1)), lm.width(lm.final_cut)) == (32, 16)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([IDS]), output_hidden_states=True)
    for layer, site in ((2, "block"), (4, "final")):
        states = output.hidden_states[layer][0]
        found = sipit.invert(lm, states, layer=layer, site=site, policy="vocabulary")  # type: ignore[arg-type]
        assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernel_does_not_matter(attention: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    lm = LanguageModel(model, name="llama")
    found = sipit.invert(lm, true_states(model, "llama", torch.tensor(IDS))[(2, "block")], layer=2)
    assert (found.verdict, found.input_ids) == ("recovered", tuple(IDS))


def test_head_with_fewer_rows_than_the_embedding_leaves_no_token_out() -> None:
    """Tokens that the model can read but not say are tried all the same."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 100, bias=False)
    lm = LanguageModel(model, name="llama")
    found = sipit.invert(lm, lm.capture(input_ids=[3, 149, 120], layer=2), policy="likely")
    assert (found.verdict, found.input_ids) == ("recovered", (3, 149, 120))
