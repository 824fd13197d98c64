"""States in JSON are read as their producers write them; what is pooled, ragged or no number is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sipit.errors import SipitError
from tests.unit.observations.formats.reading import all_of, dump_of, dumps_of

ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).bfloat16().float()


def _written(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document), "utf-8")
    return path


def _sglang(rows: Tensor, steps: int = 0, count: int | None = None) -> dict[str, Any]:
    n_prompt = len(rows) - steps
    hidden = [rows[:n_prompt].tolist(), *rows[n_prompt:].tolist()]
    return {"text": "x", "meta_info": {"prompt_tokens": count or n_prompt, "hidden_states": hidden}}


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_answer_of_sglang_is_prompt_rows_then_decoding_steps(tmp_path: Path, steps: int) -> None:
    dump = dump_of(_written(tmp_path / "a.json", _sglang(ROWS, steps)))
    assert torch.equal(dump.values, ROWS)
    assert (dump.layer, dump.site, dump.positions_from, dump.rounded) == (None, "final", None, None)


def test_rows_that_a_cache_hit_left_out_are_counted(tmp_path: Path) -> None:
    assert dump_of(_written(tmp_path / "a.json", _sglang(ROWS, count=9))).positions_from == 5


def test_answers_of_a_batch_are_prompts(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.json", [_sglang(ROWS), _sglang(ROWS[:2])])
    assert [len(dump.values) for dump in dumps_of(path)] == [4, 2]
    assert len(dump_of(path, prompt=1).values) == 2


@pytest.mark.parametrize(
    "document",
    [
        [{"index": 0, "embedding": ROWS.tolist()}],
        {"embedding": ROWS.tolist()},
        {"data": [{"index": 0, "embedding": ROWS.tolist()}]},
        {"data": [{"index": i, "embedding": row} for i, row in enumerate(ROWS.tolist())]},
    ],
)
def test_embeddings_of_llama_cpp_are_rows_behind_the_norm(tmp_path: Path, document: Any) -> None:
    dump = dump_of(_written(tmp_path / "a.json", document))
    assert torch.equal(dump.values, ROWS)
    assert dump.site == "final"


def test_rows_of_length_one_are_unit_rows_with_their_decimals(tmp_path: Path) -> None:
    unit = torch.nn.functional.normalize(ROWS.double(), dim=1)
    rows = [[round(value, 7) for value in row] for row in unit.tolist()]
    dump = dump_of(_written(tmp_path / "a.json", [{"index": 0, "embedding": rows}]))
    assert (dump.site, dump.rounded) == ("final_unit", "decimals:7")


def test_plain_lists_leave_the_place_open(tmp_path: Path) -> None:
    assert dump_of(_written(tmp_path / "a.json", ROWS.tolist())).layer is None
    assert len(dumps_of(_written(tmp_path / "b.json", [ROWS.tolist(), ROWS.tolist()]))) == 2
    assert dump_of(_written(tmp_path / "c.json", ROWS.tolist()), layer=3).layer == 3


@pytest.mark.parametrize(
    "document",
    [
        {"embedding": ROWS[0].tolist()},
        {"meta_info": {"hidden_states": ROWS[0].tolist()}},
        {"meta_info": {"hidden_states": []}},
        [[1.0, 2.0], [3.0]],
        [[1.0, 2.0], [3.0, "x"]],
        [[1.0, 2.0], [3.0, True]],
        {"embeddings": [{"x": 1}]},
        {"embedding": [[1.0, 2.0], [3.0, None]]},
    ],
)
def test_pooled_ragged_and_other_values_are_refused(tmp_path: Path, document: Any) -> None:
    assert all(isinstance(item, SipitError) for item in all_of(_written(tmp_path / "a.json", document)))


@pytest.mark.parametrize("text", ["[[1.0, 2.0], [NaN, 1.0]]", "[[1.0, 2.0], [3.0", "[[1e999, 2.0]]", "[[" * 9999 + "1"])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert all(isinstance(item, SipitError) for item in all_of(tmp_path / "a.json"))
