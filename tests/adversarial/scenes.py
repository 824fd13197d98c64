"""A folder of good files, of which malformed ones are deviations: a model, observations, records, a fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sipit
from sipit import LanguageModel, Observation
from sipit.inversion import SearchOptions, certificate_of, invert_many, write_certificate
from sipit.inversion.inverses.network import InverseNetwork
from sipit.inversion.inverses.store import Fit, fit_folder, load_fit, save_fit
from sipit.observations import Cut, write_observations
from sipit.storage import LineLog
from tests.tiny_models import text_model

TEXT = "good text"
_LAYER = 2


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Good files in a folder: "seen", "many", "certificate", "log", "model", "model.gguf" and "cache"."""

    folder: Path
    model: str  # the model's folder
    seen: Observation  # of TEXT
    input_ids: tuple[int, ...]
    texts: tuple[str, ...]  # of the observations in "many"


def built_scene(folder: Path) -> Scene:
    """Fill a folder with good files."""
    model = folder / "model"
    made = text_model(bos=False)
    made.model.save_pretrained(model)  # type: ignore[operator]
    made.tokenizer.save_pretrained(model)
    lm = sipit.load(model)
    seen = lm.capture(TEXT, layer=_LAYER)
    sipit.write_observation(seen, folder / "seen")
    found = sipit.invert(lm, seen, use_fit=False)
    write_certificate(found, folder / "certificate")
    texts = (TEXT, "two", "and three")
    observations = [lm.capture(text, layer=_LAYER) for text in texts]
    write_observations(observations, folder / "many")
    log = LineLog(folder / "log")
    for i, each in enumerate(invert_many(lm, observations[:2], SearchOptions(use_fit=False))):
        log.append({"file": f"states.{i:06d}", **certificate_of(each)})
    _write_fit(lm, folder / "cache")
    write_gguf(lm, folder / "model.gguf")
    return Scene(folder=folder, model=str(model), seen=seen, input_ids=found.input_ids, texts=texts)


def _write_fit(lm: LanguageModel, cache: Path) -> None:
    """Write a fit of random weights: the right format is all that matters here."""
    with _environment(SIPIT_CACHE=str(cache)), torch.random.fork_rng():
        torch.manual_seed(0)
        network = InverseNetwork(lm.d_model, lm.d_model, lm.vocab_size, 16)
        fit = Fit(
            network=network,
            first_mean=torch.zeros(lm.d_model, dtype=torch.float64),
            first_weight=torch.eye(lm.d_model, dtype=torch.float64),
            sink_cosine=0.9,
            temperature=1.0,
            likelihood_weight=0.5,
            report={"fit_block_tokens": 1, "seconds": 1.0, "held_out": {}},
        )
        cut = Cut(_LAYER)
        fit_folder(lm).mkdir(parents=True)
        save_fit(lm, cut, fit)
        if load_fit(lm, cut) is None:
            raise AssertionError("the fit of this scene is not read back")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    old = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in old.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def write_gguf(lm: LanguageModel, path: Path, merges: Sequence[str] = ()) -> None:
    """Write a tiny Llama over bytes as a GGUF file in float32; llama.cpp reads none without a merge of two tokens."""
    import gguf

    config: Any = lm.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([lm.tokenizer.convert_ids_to_tokens(i) or f"<unused {i}>" for i in range(lm.vocab_size)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }
    for name, value in lm.model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
