"""The k largest logits of each row are read with the tokens they belong to, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sipit.errors import SipitError
from sipit.observations.formats import ModelShape, observation_of
from tests.unit.observations.formats.reading import all_of, dump_of, dumps_of

V, K = 50, 20
LOGITS = torch.randn(4, V, generator=torch.Generator().manual_seed(2))
IDS = [7, 1, 2, 9, 4]
SHAPE = ModelShape(n_layers=3, vocab_size=V)


def _answer_of_vllm(rows: Tensor, **changed: Any) -> dict[str, Any]:
    tops = [row.topk(K) for row in rows]
    entries = [
        {str(i): {"logprob": v, "rank": 1} for v, i in zip(*map(Tensor.tolist, top), strict=True)} for top in tops
    ]
    return {"choices": [{"prompt_logprobs": [None, *entries], "prompt_token_ids": IDS, "text": "x", **changed}]}


def _answer_of_sglang(rows: Tensor) -> dict[str, Any]:
    entries = [[[float(row[i]), i, None] for i in row.topk(K).indices.tolist()] for row in rows]
    own = [[None, IDS[0], None], *([-1.0, i, None] for i in IDS[1:])]
    return {"text": "x", "meta_info": {"input_top_logprobs": [None, *entries], "input_token_logprobs": own}}


def _check(dump: Any, rows: Tensor, site: str) -> None:
    seen = observation_of(dump, SHAPE)
    held = seen.half_step is not None and seen.half_step.isfinite()
    assert isinstance(held, Tensor)
    assert (seen.site, seen.layer, seen.d_model, seen.is_partial) == (site, 3, V, True)
    assert held.sum(dim=1).tolist() == [K] * len(rows)
    assert torch.equal(seen.states[held], rows[held])
    assert bool(
        (seen.states[~held].view(len(rows), -1) <= seen.states[held].view(len(rows), -1).amin(1)[:, None]).all()
    )
    for row, at in zip(rows, held, strict=True):
        assert set(at.nonzero()[:, 0].tolist()) == set(row.topk(K).indices.tolist())


@pytest.mark.parametrize("keys", [("values", "indices"), ("topk_logits", "topk_ids"), ("logits", "token_ids")])
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_tensors_of_values_and_ids_are_read(keys: tuple[str, str], suffix: str, tmp_path: Path) -> None:
    path, top = tmp_path / f"top{suffix}", LOGITS.topk(K)
    tensors = {keys[0]: top.values, keys[1]: top.indices}
    if suffix == ".pt":
        torch.save(tensors, path)
    elif suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})  # type: ignore[arg-type]
    else:
        save_file(tensors, path)
    _check(dump_of(path), LOGITS, "logits")


def test_log_probabilities_are_told_from_logits_by_their_sum(tmp_path: Path) -> None:
    top = LOGITS.log_softmax(dim=1).topk(K)
    torch.save({"values": top.values, "indices": top.indices}, tmp_path / "a.pt")
    assert dump_of(tmp_path / "a.pt").site == "log_probs"
    assert dump_of(tmp_path / "a.pt", site="logits").site == "logits"


def test_a_padded_batch_is_read_prompt_by_prompt(tmp_path: Path) -> None:
    top = torch.stack([LOGITS, LOGITS.flip(0)]).topk(K)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    torch.save({"values": top.values, "indices": top.indices, "attention_mask": mask}, tmp_path / "a.pt")
    first, second = dumps_of(tmp_path / "a.pt")
    _check(first, LOGITS[:3], "logits")
    _check(second, LOGITS.flip(0), "logits")
    _check(dump_of(tmp_path / "a.pt", prompt=1), LOGITS.flip(0), "logits")


@pytest.mark.parametrize("answer", [_answer_of_vllm, _answer_of_sglang])
def test_answers_of_servers_are_rows_of_the_token_before(answer: Any, tmp_path: Path) -> None:
    rows = LOGITS.log_softmax(dim=1)
    (tmp_path / "a.json").write_text(json.dumps(answer(rows)), "utf-8")
    dump = dump_of(tmp_path / "a.json")
    _check(dump, rows, "log_probs")
    assert dump.input_ids == tuple(IDS[:-1])
    assert any("in clear" in note for note in dump.notes)


def test_rows_that_hold_one_value_more_are_kept_whole(tmp_path: Path) -> None:
    answer = _answer_of_vllm(LOGITS.log_softmax(dim=1))
    own = next(i for i in range(V) if str(i) not in answer["choices"][0]["prompt_logprobs"][2])
    answer["choices"][0]["prompt_logprobs"][2][str(own)] = {"logprob": -9.0}
    (tmp_path / "a.json").write_text(json.dumps(answer), "utf-8")
    seen = observation_of(dump_of(tmp_path / "a.json"), SHAPE)
    assert seen.half_step is not None
    assert seen.half_step.isfinite().sum(dim=1).tolist() == [K, K + 1, K, K]
    assert float(seen.states[1, own]) == -9.0


def test_values_keep_the_rounding_that_shows_in_them(tmp_path: Path) -> None:
    top = LOGITS.bfloat16().topk(K)
    torch.save({"values": top.values, "indices": top.indices}, tmp_path / "a.pt")
    assert observation_of(dump_of(tmp_path / "a.pt"), SHAPE).dtype == "bfloat16"


_TOP = LOGITS.topk(K)
_BROKEN: dict[str, tuple[Any, str]] = {
    "few": ({"values": _TOP.values[:, :9].clone(), "indices": _TOP.indices[:, :9].clone()}, "too few"),
    "twice": ({"values": _TOP.values, "indices": _TOP.indices.clone().fill_(3)}, "twice"),
    "nan": ({"values": _TOP.values * torch.nan, "indices": _TOP.indices}, "too few"),
    "unnamed": ({"values": _TOP.values, "indices": -_TOP.indices - 1}, "too few"),
    "four axes": ({"values": _TOP.values[None, None], "indices": _TOP.indices[None, None]}, "expected"),
}


@pytest.mark.parametrize("fault", _BROKEN)
def test_broken_tensors_are_refused(fault: str, tmp_path: Path) -> None:
    stored, reason = _BROKEN[fault]
    torch.save(stored, tmp_path / "a.pt")
    (error,) = all_of(tmp_path / "a.pt")
    assert isinstance(error, SipitError)
    assert reason in str(error)


@pytest.mark.parametrize(
    "entries",
    [
        [None, {"a": {"logprob": -1.0}}],
        [None, {"1": {"logprob": "x"}}],
        [None, {"1": {"logprob": -1.0}}],
        [None, []],
        {"1": 2},
        [None, {"99999999999": -1.0}],
    ],
)
def test_broken_answers_are_refused(entries: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"prompt_logprobs": entries}), "utf-8")
    (error,) = all_of(tmp_path / "a.json")
    assert isinstance(error, SipitError)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    torch.save({"values": _TOP.values, "indices": _TOP.indices}, tmp_path / "a.pt")
    with pytest.raises(SipitError, match="vocabulary has 30"):
        observation_of(dump_of(tmp_path / "a.pt"), ModelShape(n_layers=3, vocab_size=30))
