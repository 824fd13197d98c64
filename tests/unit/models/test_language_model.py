"""Text to tokens, tokens to states: what is accepted, what is refused, what is kept byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, FalconConfig

import sipit
from sipit import LanguageModel, SipitError
from sipit.errors import InputError, ModelError, NonFiniteError, OptionError
from sipit.inversion.inverses import arithmetic
from sipit.models import families
from sipit.models.families import Family
from sipit.models.row_masks import RowMasks
from tests.tiny_models import (
    FAMILIES,
    N_LAYERS,
    VOCAB,
    copy_of,
    embedding_rows,
    random_ids,
    text_model,
    tiny_model,
    true_states,
)

IDS = random_ids(6, seed=4)
TEXTS = [
    "plain",
    " leading space",
    "trailing newlines\n\n\n",
    "tab\tand\rreturn",
    "émoji 🦔🏳️‍🌈",
    "\n",
    "null\0byte",
    "é vs é",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("bos", [False, True])
def test_text_survives_the_round_trip_byte_for_byte(text: str, bos: bool) -> None:
    lm = text_model(bos=bos)
    found = sipit.invert(lm, lm.capture(text, layer=2))
    assert found.text == ("<s>" if bos else "") + text
    assert found.verdict == "recovered"


def test_bos_is_added_where_the_tokenizer_adds_it() -> None:
    assert text_model(bos=True).encode("ab").tolist()[0] == 256
    assert text_model(bos=False).encode("ab").numel() == 2


def test_chat_template_is_applied_once_with_the_reply_begun() -> None:
    lm = text_model(bos=True)
    expected = "<s>user\nHello<e>\n<s>assistant\n"
    assert lm.decode(lm.encode("Hello", chat=True)) == expected
    messages = [{"role": "user", "content": "Hello"}]
    assert torch.equal(lm.encode_chat(messages), lm.encode("Hello", chat=True))
    by_flag, by_list = lm.capture("Hello", chat=True, layer=1), lm.capture(messages, layer=1)
    assert by_flag.digest() == by_list.digest()
    assert sipit.invert(lm, by_flag).text == expected


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        text_model(chat=False).capture("Hello", layer=1, chat=True)


def test_text_without_a_tokenizer_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        llama.capture("Hello", layer=1)
    assert llama.decode([1, 2]) is None


def test_ids_may_come_as_list_tensor_row_or_array(llama: LanguageModel) -> None:
    expected = llama.capture(input_ids=IDS, layer=2).digest()
    forms: list[Any] = [IDS.tolist(), tuple(IDS.tolist()), IDS[None], IDS.int(), IDS.numpy()]
    for form in forms:
        assert llama.capture(input_ids=form, layer=2).digest() == expected


def test_observation_names_its_origin(llama: LanguageModel) -> None:
    seen = llama.capture(input_ids=IDS, layer=2)
    assert (seen.layer, seen.site, seen.model, seen.fingerprint) == (2, "block", "llama", llama.fingerprint)
    assert (seen.seq_len, seen.d_model, seen.dtype) == (6, 32, "float32")
    assert llama.capture(input_ids=IDS, site="final").layer == N_LAYERS


def test_observation_holds_no_token() -> None:
    """States of two prompts differ; nothing else of an observation does."""
    lm = text_model()
    one, other = lm.capture("abc", layer=2), lm.capture("xyz", layer=2)
    named = {"states", "layer", "site", "positions", "known_prefix", "model", "fingerprint", "half_step", "is_last"}
    assert set(vars(one)) == named
    for name in set(vars(one)) - {"states"}:
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", torch.bfloat16])
def test_states_are_stored_in_the_dtype_asked_for(llama: LanguageModel, dtype: str | torch.dtype) -> None:
    seen = llama.capture(input_ids=IDS, layer=2, dtype=dtype)
    assert seen.dtype == str(dtype).removeprefix("torch.")
    expected = true_states(llama.model, "llama", IDS)[(2, "block")].to(seen.states.dtype)
    assert torch.equal(seen.states, expected)


def test_overflow_of_the_stored_dtype_is_refused() -> None:
    model = tiny_model("llama")
    embedding_rows(model).mul_(1e6)
    with pytest.raises(NonFiniteError, match="float16"):
        LanguageModel(model).capture(input_ids=IDS, layer=0, dtype="float16")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"input_ids": [], "layer": 1}, InputError),
        ({"input_ids": [0, VOCAB], "layer": 1}, InputError),
        ({"input_ids": [0, -1], "layer": 1}, InputError),
        ({"input_ids": [[1, 2], [3, 4]], "layer": 1}, InputError),
        ({"input_ids": torch.tensor(3), "layer": 1}, InputError),
        ({"input_ids": torch.tensor([1.0, 2.0]), "layer": 1}, InputError),
        ({"input_ids": [1.5, 2.0], "layer": 1}, InputError),
        ({"input_ids": ["a", "b"], "layer": 1}, InputError),
        ({"input_ids": [[1], [2, 3]], "layer": 1}, InputError),
        ({"input_ids": [1], "layer": -1}, OptionError),
        ({"input_ids": [1], "layer": N_LAYERS + 1}, OptionError),
        ({"input_ids": [1]}, OptionError),
        ({"input_ids": [1], "layer": 1, "site": "final"}, OptionError),
        ({"input_ids": [1], "layer": N_LAYERS, "site": "kv"}, OptionError),
        ({"input_ids": [1], "layer": 1, "site": "logits"}, OptionError),
        ({"input_ids": [1], "layer": 1, "site": "nonsense"}, OptionError),
        ({"input_ids": [1], "layer": 1, "dtype": "int8"}, OptionError),
        ({"layer": 1}, OptionError),
        ({"text": "a", "input_ids": [1], "layer": 1}, OptionError),
    ],
)
def test_bad_capture_is_refused(llama: LanguageModel, options: dict[str, Any], error: type[SipitError]) -> None:
    with pytest.raises(error):
        llama.capture(**options)


def test_empty_text_is_refused_unless_the_tokenizer_adds_a_token() -> None:
    with pytest.raises(InputError, match="empty"):
        text_model(bos=False).capture("", layer=1)
    assert text_model(bos=True).capture("", layer=1).seq_len == 1


def test_prompt_longer_than_the_position_table_is_refused() -> None:
    lm = LanguageModel(tiny_model("gpt2", n_positions=128, max_position_embeddings=128))
    with pytest.raises(InputError, match="128"):
        lm.capture(input_ids=[1] * 129, layer=1)


def test_model_with_a_short_position_table_is_inverted() -> None:
    lm = LanguageModel(tiny_model("gpt2", n_positions=32, max_position_embeddings=32))
    found = sipit.invert(lm, lm.capture(input_ids=IDS, layer=2))
    assert found.input_ids == tuple(IDS.tolist())


def test_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match="training mode"):
        LanguageModel(tiny_model("llama").train())


def test_unknown_layout_is_refused() -> None:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    bert = AutoModelForCausalLM.from_config(BertConfig(vocab_size=50, is_decoder=True, **shape)).eval()
    with pytest.raises(ModelError, match="bert"):
        LanguageModel(bert)


@pytest.mark.parametrize(
    "row",
    [
        Family(trunk="model", final=()),  # the final norm stays in
        Family(trunk="model", final=("rotary_emb",)),  # something else is taken out
    ],
)
def test_cut_that_fails_its_self_check_is_refused(monkeypatch: pytest.MonkeyPatch, row: Family) -> None:
    monkeypatch.setitem(families.FAMILIES, "llama", row)
    with pytest.raises(ModelError, match="not supported"):
        LanguageModel(tiny_model("llama"), name="damaged")


def test_fingerprint_is_stable_and_tells_weights_apart() -> None:
    model = tiny_model("llama")
    first = LanguageModel(model).fingerprint
    assert LanguageModel(copy_of(model), name="another name").fingerprint == first
    other = copy_of(model)
    with torch.no_grad():
        other.model.layers[3].mlp.down_proj.weight[5, 7] += 1e-3
    assert LanguageModel(other).fingerprint != first
    assert LanguageModel(copy_of(model).bfloat16()).fingerprint != first


def test_fingerprint_tells_configs_apart() -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    other.config.rms_norm_eps = 1e-3
    assert LanguageModel(one).fingerprint != LanguageModel(other).fingerprint


@pytest.mark.parametrize("config", ["bloom", "falcon"])
def test_models_that_bias_attention_by_distance_are_refused_at_load(config: str) -> None:
    shape: dict[str, Any] = {"vocab_size": 150, "hidden_size": 32, "initializer_range": 0.25}
    made: Any = {
        "bloom": lambda: BloomConfig(**shape, n_layer=4, n_head=4),
        "falcon": lambda: FalconConfig(**shape, num_hidden_layers=4, num_attention_heads=4, alibi=True),
    }[config]()
    with pytest.raises(ModelError, match=f"packed pass.*{config}.*not supported") as caught:
        LanguageModel(AutoModelForCausalLM.from_config(made).eval(), name="tilted")
    assert "\n" not in str(caught.value)


def test_packed_pass_that_gives_other_states_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(_: RowMasks, visible: torch.Tensor, *__: Any) -> Any:
        return torch.zeros(visible.shape)[None, None]  # every token sees every other

    monkeypatch.setattr(RowMasks, "masks", blind)
    with pytest.raises(ModelError, match="other states in a packed pass"):
        LanguageModel(tiny_model("llama"), name="blind")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_model_without_a_head_is_refused_with_the_class_to_load_it_by(family: str) -> None:
    with pytest.raises(ModelError, match=r"'headless'.*no language-model head.*AutoModelForCausalLM"):
        LanguageModel(tiny_model(family).base_model, name="headless")


@pytest.mark.parametrize("layer", ["2", True, 1.0, [1]])
def test_layer_that_is_no_whole_number_is_refused(layer: Any) -> None:
    lm = LanguageModel(tiny_model("llama"))
    with pytest.raises(OptionError, match="not a whole number; pass 0 to 4"):
        lm.capture(input_ids=IDS, layer=layer)
    with pytest.raises(OptionError, match="not a whole number"):
        lm.checked_layer(layer, "final")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inverts_on_a_machine_fast_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(arithmetic, "is_fast_in_bfloat16", lambda _: True)
    lm = LanguageModel(tiny_model(family).to(dtype), name=family)
    seen = lm.capture(input_ids=[5, 17, 99], layer=2)
    if family == "mixtral" and dtype == torch.float16:  # a last digit chooses other experts
        with pytest.raises(ModelError, match="experts"):
            sipit.invert(lm, seen)
        return
    found = sipit.invert(lm, seen)
    assert found.input_ids == (5, 17, 99)
