"""The states of a prompt survive their file bit for bit, and nothing else passes for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import sipit
from sipit import Observation
from sipit.errors import InputError, NonFiniteError, OptionError, ShapeError, SipitError, StorageError
from sipit.observations import DTYPES, SITES, dtype_named, holds_many, read_each, read_observations, write_observations

METADATA = {"format": "sipit.observation", "version": "1", "site": "block", "layer": "2", "positions": "[0, 1, 2]"}


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """Any finite bit patterns of any dtype: subnormals, negative zero, the largest numbers."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    n_rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    raw = draw(st.binary(min_size=n_rows * width * dtype.itemsize, max_size=n_rows * width * dtype.itemsize))
    states = torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(dtype).reshape(n_rows, width)
    states = torch.where(torch.isfinite(states), states, torch.zeros_like(states))
    gaps = draw(st.lists(st.integers(1, 3), min_size=n_rows, max_size=n_rows))
    positions = tuple(int(p) - 1 for p in np.cumsum(gaps))
    text = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    return Observation(
        states=states,
        layer=draw(st.integers(0, 200)),
        site=draw(st.sampled_from(SITES)),
        positions=draw(st.sampled_from([(), positions])),
        model=draw(text),
        fingerprint=draw(text),
    )


@given(seen=observations())
def test_observation_survives_its_file_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, seen: Observation) -> None:
    path = tmp_path_factory.mktemp("file") / "seen.safetensors"
    sipit.write_observation(seen, path)
    again = sipit.read_observation(path)
    assert again.states.dtype == seen.states.dtype
    assert again.states.shape == seen.states.shape
    bits = (again.states.flatten().view(torch.uint8), seen.states.flatten().view(torch.uint8))
    assert torch.equal(*bits)
    for name in ("layer", "site", "positions", "model", "fingerprint", "is_complete"):
        assert getattr(again, name) == getattr(seen, name)
    assert again.digest() == seen.digest()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@given(seen=observations(), data=st.data())
def test_digest_tells_any_changed_bit(seen: Observation, data: st.DataObject) -> None:
    raw = seen.states.clone().flatten().view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1  # may not make a finite number infinite in the low byte
    changed = raw.view(seen.states.dtype).reshape(seen.states.shape)
    if bool(torch.isfinite(changed).all()):
        other = Observation(states=changed, layer=seen.layer, site=seen.site, positions=seen.positions)
        assert other.digest() != seen.digest()
    shifted = Observation(states=seen.states, layer=seen.layer + 1, site=seen.site, positions=seen.positions)
    assert shifted.digest() != seen.digest()


def test_digest_does_not_depend_on_memory_layout() -> None:
    states = torch.arange(12.0).reshape(3, 4)
    assert Observation(states=states.T, layer=0).digest() == Observation(states=states.T.contiguous(), layer=0).digest()


def test_transposed_states_are_written_as_seen(tmp_path: Path) -> None:
    states = torch.arange(12.0).reshape(3, 4).T
    sipit.write_observation(Observation(states=states, layer=0), tmp_path / "x")
    assert torch.equal(sipit.read_observation(tmp_path / "x").states, states)


def test_positions_default_to_every_row() -> None:
    seen = Observation(states=torch.zeros(3, 2), layer=0)
    assert seen.positions == (0, 1, 2)
    assert seen.is_complete
    assert not Observation(states=torch.zeros(3, 2), layer=0, positions=(0, 1, 3)).is_complete


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"states": torch.zeros(3)}, ShapeError),
        ({"states": torch.zeros(1, 3, 2)}, ShapeError),
        ({"states": torch.zeros(0, 2)}, ShapeError),
        ({"states": torch.zeros(2, 0)}, ShapeError),
        ({"states": torch.zeros(2, 2, dtype=torch.int32)}, ShapeError),
        ({"states": torch.zeros(2, 2, dtype=torch.complex64)}, ShapeError),
        ({"states": torch.tensor([[0.0, float("nan")]])}, NonFiniteError),
        ({"states": torch.tensor([[0.0, -float("inf")]])}, NonFiniteError),
        ({"layer": -1}, OptionError),
        ({"site": "nonsense"}, OptionError),
        ({"positions": (0,)}, InputError),
        ({"positions": (0, 0)}, InputError),
        ({"positions": (1, 0)}, InputError),
        ({"positions": (-1, 0)}, InputError),
    ],
)
def test_bad_observation_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Observation(**{"states": torch.zeros(2, 2), "layer": 1, **options})


def test_dtype_names_are_closed() -> None:
    assert dtype_named("bfloat16") is torch.bfloat16
    assert dtype_named(torch.float16) is torch.float16
    for name in ("int8", "float8_e4m3fn", "", "Float32"):
        with pytest.raises(OptionError, match="float32"):
            dtype_named(name)


def _file(path: Path, *, states: torch.Tensor | None = None, name: str = "states", **metadata: Any) -> Path:
    tensor = torch.zeros(3, 4) if states is None else states
    merged = {key: value for key, value in {**METADATA, **metadata}.items() if value is not None}
    save_file({name: tensor}, path, metadata=merged)
    return path


def test_plain_file_is_read(tmp_path: Path) -> None:
    assert sipit.read_observation(_file(tmp_path / "x")).layer == 2


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": None},
        {"format": "sipit.certificate"},
        {"version": None},
        {"version": "2"},
        {"version": ""},
        {"site": None},
        {"site": "nonsense"},
        {"layer": None},
        {"layer": "two"},
        {"layer": "2.5"},
        {"layer": ""},
        {"positions": None},
        {"positions": "0, 1, 2"},
        {"positions": "[0, 1"},
        {"positions": "5"},
        {"positions": "null"},
        {"positions": "[0, 1]"},
        {"positions": "[0, 0, 1]"},
        {"positions": "[2, 1, 0]"},
        {"positions": "[-1, 0, 1]"},
        {"positions": '["a", "b", "c"]'},
        {"positions": "[0.5, 1.5, 2.5]"},
        {"positions": "[0, 1, Infinity]"},
        {"positions": "[0, 1, NaN]"},
        {"positions": "[" * 100_000},
        {"note": "unknown key"},
        {"name": "other tensor"},
    ],
)
def test_file_with_bad_metadata_is_refused_by_name(tmp_path: Path, metadata: dict[str, Any]) -> None:
    path = _file(tmp_path / "seen.safetensors", **metadata)
    with pytest.raises(InputError, match=r"seen\.safetensors"):
        sipit.read_observation(path)


def test_negative_layer_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="negative"):
        sipit.read_observation(_file(tmp_path / "x", layer="-1"))


@pytest.mark.parametrize(
    ("states", "error"),
    [
        (torch.zeros(3), ShapeError),
        (torch.zeros(3, 2, 2), ShapeError),
        (torch.zeros(0, 4), ShapeError),
        (torch.zeros(3, 4, dtype=torch.int64), ShapeError),
        (torch.full((3, 4), float("nan")), NonFiniteError),
        (torch.full((3, 4), float("inf")), NonFiniteError),
    ],
)
def test_file_with_bad_states_is_refused_by_name(tmp_path: Path, states: torch.Tensor, error: type[InputError]) -> None:
    path = _file(tmp_path / "seen.safetensors", states=states)
    with pytest.raises(error, match=r"seen\.safetensors"):
        sipit.read_observation(path)


def test_file_with_a_second_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"states": torch.zeros(3, 4), "more": torch.zeros(1)}, tmp_path / "x", metadata=METADATA)
    with pytest.raises(InputError, match="more"):
        sipit.read_observation(tmp_path / "x")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, -1])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = _file(tmp_path / "x")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        sipit.read_observation(path)


def test_file_with_bytes_behind_its_end_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path / "x")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError):
        sipit.read_observation(path)


@pytest.mark.parametrize(
    "content", [b"plain text, no tensors", json.dumps({"states": [1.0]}).encode(), b"\x80\x04K\x01."]
)
def test_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError):
        sipit.read_observation(tmp_path / "x")


def test_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = b'{"states":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(InputError):
        sipit.read_observation(tmp_path / "x")


def test_absent_file_and_folder_are_storage_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(StorageError, match="cannot read"):
            sipit.read_observation(path)


def test_unwritable_target_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    seen = Observation(states=torch.zeros(1, 1), layer=0)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent" / "x", tmp_path, tmp_path / "file" / "x"):
        with pytest.raises(StorageError, match="cannot write"):
            sipit.write_observation(seen, path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layer", [True, 1.0, "2", None])
def test_layer_that_is_no_whole_number_is_refused(layer: Any) -> None:
    with pytest.raises(OptionError, match="whole number"):
        Observation(states=torch.ones(1, 2), layer=layer)


def test_paths_that_are_no_regular_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "n" * 300, "a\0b", "absent"):
        path = tmp_path / name
        assert not holds_many(path)
        with pytest.raises(StorageError, match="cannot read"):
            sipit.read_observation(path)
        with pytest.raises(StorageError, match="cannot read"):
            list(read_observations(path))


@pytest.mark.parametrize(
    ("about", "found"),
    [({"layer": 1.0}, "whole number"), ({"layer": True}, "whole number"), ({"layer": "2"}, "whole number"),
     ({"layer": None}, "whole number"), ({"site": []}, "site")],
)  # fmt: skip
def test_file_of_many_with_a_wrong_description_is_refused(tmp_path: Path, about: dict[str, Any], found: str) -> None:
    described = {"site": "block", "layer": 1, "positions": [0], "model": None, "fingerprint": None, **about}
    _write_many(tmp_path / "x.safetensors", json.dumps([described]))
    with pytest.raises(InputError, match=found):
        list(read_observations(tmp_path / "x.safetensors"))


def test_deep_json_in_metadata_is_refused(tmp_path: Path) -> None:
    deep = "[" * 10**5 + "]" * 10**5
    _write_many(tmp_path / "many.safetensors", deep)
    with pytest.raises(InputError, match="nest"):
        list(read_observations(tmp_path / "many.safetensors"))
    save_file({"states": torch.ones(3, 2)}, tmp_path / "one.safetensors", metadata={**METADATA, "positions": deep})
    with pytest.raises(InputError, match="positions"):
        sipit.read_observation(tmp_path / "one.safetensors")


def test_one_foreign_or_broken_file_does_not_stop_the_others(tmp_path: Path) -> None:
    seen = Observation(states=torch.ones(1, 2), layer=1)
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"broken")
    os.mkfifo(tmp_path / "c.safetensors")
    write_observations([seen, seen], tmp_path / "d.safetensors")
    sipit.write_observation(seen, tmp_path / "e.safetensors")
    read = dict(read_each(tmp_path))
    errors = {name[0]: type(value) for name, value in read.items() if isinstance(value, SipitError)}
    assert errors == {"a": InputError, "b": InputError, "c": StorageError}
    kept = [name for name, value in read.items() if isinstance(value, Observation)]
    assert kept == ["d.safetensors:states.000000", "d.safetensors:states.000001", "e.safetensors"]
    with pytest.raises(InputError, match="not an observation file"):
        list(read_observations(tmp_path))


def _write_many(path: Path, described: str) -> None:
    metadata = {"format": "sipit.observations", "version": "1", "observations": described}
    save_file({"states.000000": torch.ones(1, 2)}, path, metadata=metadata)
