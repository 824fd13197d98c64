"""Dictionaries, tuples and caches of torch.save are read by what their producer means, with weights_only alone."""

from __future__ import annotations

import gzip
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel
from sipit.errors import InputError, NonFiniteError, OptionError, SipitError
from tests.unit.observations.formats.reading import all_of, dump_of, dumps_of, error_of

IDS = torch.arange(20, 26)
N = len(IDS)


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("is_packed", [False, True])
def test_specforge_last_states_are_normed_and_joined_ones_are_cut(tmp_path: Path, is_packed: bool) -> None:
    last, aux = states(1, N, 4), states(1, N, 12)
    path = saved(
        tmp_path / "data_0.ckpt",
        {"input_ids": IDS, "loss_mask": torch.ones(N), "hidden_state": last, "aux_hidden_state": aux},
    )
    if is_packed:
        path = tmp_path / "data_0.ckpt.gz"
        path.write_bytes(gzip.compress((tmp_path / "data_0.ckpt").read_bytes()))
    found = dumps_of(path)
    assert [(dump.layer, dump.site) for dump in found] == [(None, "final")] + [(None, "block")] * 3
    assert torch.equal(found[0].values, last[0])
    assert torch.equal(found[2].values, aux[0, :, 4:8])
    assert all(dump.input_ids == tuple(range(20, 26)) for dump in found)
    named = dumps_of(path, layers=(2, 8, 13), key="aux_hidden_state")
    assert [dump.layer for dump in named] == [2, 8, 13]
    one = dump_of(path, layers=(2, 8, 13), layer=8, site="block")
    assert torch.equal(one.values, aux[0, :, 4:8])
    assert torch.equal(dump_of(path, site="final").values, last[0])


def test_eagle_states_are_the_normed_last_ones(tmp_path: Path) -> None:
    hidden: Tensor = states(N, 4).half()
    value = {"input_ids": IDS, "hidden_state": hidden, "loss_mask": torch.ones(N)}
    dump = dump_of(saved(tmp_path / "data_0.ckpt", value))
    assert (dump.layer, dump.site, dump.choices) == (None, "final", ())
    assert torch.equal(dump.values, hidden)


def test_model_optimizer_last_states_may_be_normed_or_not(tmp_path: Path) -> None:
    value = {
        "input_ids": IDS,
        "hidden_states": states(N, 4),
        "aux_hidden_states": states(N, 8),
        "conversation_id": "c1",
    }
    path = saved(tmp_path / "c1.pt", value)
    last, *aux = dumps_of(path)
    assert last.choices == ((None, "final"), (None, "block"))
    assert (last.layer, last.site) == (None, None)
    assert [dump.values.shape[1] for dump in aux] == [4, 4]
    told = dump_of(path, key="hidden_states", site="final")
    assert (told.site, told.choices) == ("final", ())


def test_old_speculators_last_entry_may_be_normed_or_not(tmp_path: Path) -> None:
    entries = [states(N, 4) + i for i in range(4)]
    path = saved(tmp_path / "data_0.pt", {"input_ids": IDS, "hidden_states": entries, "loss_mask": torch.ones(N)})
    found = dumps_of(path, layers=(3, 16, 28, 30))
    assert [dump.layer for dump in found] == [3, 16, 28, None]
    assert found[3].choices == ((30, "block"), (30, "final"))
    assert "declared id 15, +1" in " ".join(found[1].notes)
    assert all(
        torch.equal(dump.values, torch.as_tensor(entry, dtype=torch.float32))
        for dump, entry in zip(found, entries, strict=True)
    )
    told = dump_of(path, layers=(3, 16, 28, 30), layer=30, site="block")
    assert (told.layer, told.site) == (30, "block")


def test_tensorrt_list_of_prompts_is_one_dump_each(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"id": i, "input_ids": IDS, "hidden_states": states(N, 4) + i} for i in range(3)]
    path = saved(tmp_path / "x_0.pt", entries)
    assert len(dumps_of(path)) == 3
    assert torch.equal(dump_of(path, prompt=2).values, entries[2]["hidden_states"])


def _run(lm: LanguageModel, ids: Tensor, **more: Any) -> Any:
    with torch.no_grad():
        return lm.model(ids, output_hidden_states=True, use_cache=True, **more)


def test_transformers_tuple_is_every_layer_and_the_normed_last(tmp_path: Path, llama: LanguageModel) -> None:
    out = _run(llama, IDS[None])
    path = saved(tmp_path / "h.pt", tuple(out.hidden_states))
    found = dumps_of(path)
    last = len(out.hidden_states) - 1
    assert [(d.layer, d.site) for d in found] == [*((i, "block") for i in range(last)), (last, "final")]
    for i, dump in enumerate(found):
        assert torch.equal(dump.values, out.hidden_states[i][0])
    # The same states as our own capture of that layer.
    assert torch.allclose(dump_of(path, layer=2).values, llama.capture(IDS.tolist(), layer=2).states, atol=1e-4)
    assert dump_of(path, site="final").layer == last


def test_padding_of_a_batch_is_cut_by_its_mask_or_left_and_noted(tmp_path: Path, llama: LanguageModel) -> None:
    ids = torch.stack([IDS, IDS + 1])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    hidden = tuple(_run(llama, ids, attention_mask=mask).hidden_states)
    path = saved(tmp_path / "a.pt", {"hidden_states": hidden, "attention_mask": mask, "input_ids": ids})
    dump = dump_of(path, layer=2, prompt=1)
    assert torch.equal(dump.values, hidden[2][1, 2:])
    assert dump.input_ids == tuple(range(23, 27))
    assert "2 rows cut (left" in " ".join(dump.notes)
    both = dumps_of(saved(tmp_path / "b.pt", hidden), layer=2)
    assert [d.values.shape[0] for d in both] == [N, N]
    assert "left in" in " ".join(both[1].notes)
    assert both[1].name.endswith("prompt 1")


def test_generate_steps_are_joined_by_layer(tmp_path: Path, llama: LanguageModel) -> None:
    with torch.no_grad():
        out = llama.model.generate(  # type: ignore[operator]
            IDS[None],
            attention_mask=torch.ones(1, N),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    whole = _run(llama, out.sequences[:, :-1]).hidden_states
    found = dumps_of(saved(tmp_path / "g.pt", tuple(out.hidden_states)))
    assert len(found) == len(whole)
    for dump, expected in zip(found, whole, strict=True):
        assert torch.allclose(dump.values, expected[0], atol=1e-3)


@pytest.mark.parametrize("size", [2, 3])
def test_cache_tuples_are_keys_then_values_of_each_block(tmp_path: Path, llama: LanguageModel, size: int) -> None:
    layers = _run(llama, IDS[None]).past_key_values.layers
    value: Any = tuple((layer.keys, layer.values, None)[:size] for layer in layers)
    path = saved(tmp_path / "kv.pt", value)
    found = dumps_of(path)
    assert [(d.layer, d.site) for d in found] == [(i, "kv") for i in range(len(layers))]
    keys, values = value[1][0][0], value[1][1][0]
    for t in range(N):
        assert torch.equal(found[1].values[t], torch.cat([keys[:, t].flatten(), values[:, t].flatten()]))
    alone = dump_of(path, layer=1, site="values")
    assert alone.site == "values"
    assert torch.equal(alone.values[3], values[:, 3].flatten())
    pair = dump_of(saved(tmp_path / "pair.pt", value[1]))
    assert (pair.layer, pair.site) == (None, "kv")


def test_slid_window_and_unused_rows_are_named(tmp_path: Path) -> None:
    full, window = states(1, 2, 6, 4), states(1, 2, 4, 4)
    full[:, :, 5:] = 0
    first, second = dumps_of(saved(tmp_path / "kv.pt", ((full, full), (window, window))))
    assert first.values.shape[0] == 5
    assert "unused rows" in " ".join(first.notes)
    assert second.positions_from == 2


def test_transformer_lens_names_tell_the_layer(tmp_path: Path) -> None:
    names = ("hook_embed", "blocks.3.hook_resid_pre", "blocks.3.hook_resid_mid", "blocks.3.hook_resid_post")
    path = saved(tmp_path / "c.pt", OrderedDict((name, states(1, N, 4) + i) for i, name in enumerate(names)))
    found = dumps_of(path)
    assert [(d.layer, d.site) for d in found] == [(3, "block"), (4, "block")]
    assert found[0].name == "c.pt: blocks.3.hook_resid_pre"
    assert dump_of(path, layer=4).name.endswith("post")
    assert dump_of(path, key="hook_embed").layer is None


def test_one_bad_entry_does_not_stop_the_others(tmp_path: Path) -> None:
    entries = [states(1, N, 4) for _ in range(4)]
    entries[1][0, 2, 1] = float("inf")
    entries[2] = states(4)
    items = all_of(saved(tmp_path / "h.pt", tuple(entries)))
    assert [type(item).__name__ for item in items] == ["Dump", "NonFiniteError", "ShapeError", "Dump"]
    assert "row 2" in str(items[1])


def test_classes_are_refused_with_the_way_to_save_them(tmp_path: Path, llama: LanguageModel) -> None:
    out = _run(llama, IDS[None])
    recipes = {
        "cache": (out.past_key_values, "layer.keys, layer.values"),
        "output": (out, "tuple(out.hidden_states)"),
        "numpy": ({"a": states(2, 2).numpy()}, "torch.from_numpy"),
        "module": (torch.nn.Linear(2, 2), "dictionary or tuple"),
    }
    for name, (value, recipe) in recipes.items():
        error = error_of(saved(tmp_path / name, value))
        assert isinstance(error, InputError)
        assert recipe in str(error)


MALFORMED: dict[str, Any] = {
    "nothing": {},
    "empty tuple": (),
    "text": "a prompt",
    "no floats": {"input_ids": IDS},
    "one vector": states(4),
    "rank 5": states(1, 1, 1, 2, 2),
    "no rows": states(0, 4),
    "NaN": states(3, 4) / 0 * 0,
    "expanded": torch.zeros(1, 1).expand(1 << 20, 1 << 20),
    "sparse": states(3, 4).to_sparse(),
    "whole numbers": torch.ones(3, 4, dtype=torch.int64),
    "ids of another length": {"input_ids": IDS, "hidden_state": states(N - 1, 4), "loss_mask": IDS},
    "ids as text": {"input_ids": "1 2 3", "hidden_state": states(N, 4), "loss_mask": IDS},
    "aux that does not divide": {"input_ids": IDS, "hidden_state": states(N, 4), "aux_hidden_state": states(N, 10)},
    "mask with a hole": {"hidden_states": states(1, 3, 4), "attention_mask": torch.tensor([[1, 0, 1]])},
    "mask of nothing": {"hidden_states": states(1, 3, 4), "attention_mask": torch.zeros(1, 3)},
    "mask of another length": {"hidden_states": states(1, 3, 4), "attention_mask": torch.ones(1, 4)},
    "keys without values": ((states(1, 2, 3, 4), None), (None, None)),
    "keys and values apart": ((states(1, 2, 3, 4), states(1, 2, 5, 4)),) * 2,
    "steps of text": ((states(1, 2, 4),), "x"),
    "steps that differ": ((states(1, 2, 4),), (states(1, 1, 5),)),
    "list of text": ["a", "b"],
    "dictionary in a list": [{"a": "b"}, {}],
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_object_is_refused(tmp_path: Path, kind: str) -> None:
    items = all_of(saved(tmp_path / "a.pt", MALFORMED[kind]))
    assert items
    bad = [item for item in items if isinstance(item, SipitError)]
    assert bad
    assert len(bad) == len(items) or kind == "aux that does not divide"
    assert all(isinstance(item, InputError) for item in bad)
    if kind == "NaN":
        assert isinstance(bad[0], NonFiniteError)


def test_cut_off_old_and_compressed_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", states(3, 4))
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        assert isinstance(error_of(path), InputError)
    torch.save(states(3, 4), path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in str(error_of(path))
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    assert "compressed" in str(error_of(tmp_path / "b.pt"))
    (tmp_path / "c.ckpt.gz").write_bytes(gzip.compress(raw)[:-20])
    assert "gzip" in str(error_of(tmp_path / "c.ckpt.gz"))
    (tmp_path / "d.ckpt.gz").write_bytes(gzip.compress(raw + bytes(1 << 20)))
    assert "times its size" in str(error_of(tmp_path / "d.ckpt.gz"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "h.pt", tuple(states(2, N, 4) for _ in range(4)))
    for wanted in ({"layer": 9}, {"prompt": 2, "layer": 1}, {"prompt": -1, "layer": 1}):
        assert isinstance(error_of(path, **wanted), OptionError)
