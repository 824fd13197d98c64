"""Arrays of any name are read as they lie, and a type that was lost is asked for."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sipit.errors import InputError, NonFiniteError, OptionError, ShapeError, SipitError
from tests.unit.observations.formats.reading import all_of, dump_of, dumps_of, error_of

ROWS = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32)


def saved(path: Path, array: Any) -> Path:
    with path.open("wb") as stream:
        np.save(stream, array)
    return path


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
def test_array_of_each_type_and_byte_order_keeps_its_values(tmp_path: Path, dtype: str) -> None:
    array = ROWS.astype(dtype)
    dump = dump_of(saved(tmp_path / "a", array), layer=3, site="block")
    assert dump.values.tolist() == array.tolist()
    assert dump.values.element_size() == array.itemsize
    assert (dump.layer, dump.site) == (3, "block")


@pytest.mark.parametrize("array", [ROWS[::-1], ROWS[:, ::-2], ROWS.T, np.asfortranarray(ROWS)])
def test_array_of_any_strides_keeps_its_values(tmp_path: Path, array: Any) -> None:
    assert dump_of(saved(tmp_path / "a", array)).values.tolist() == array.tolist()
    np.savez(tmp_path / "b.npz", x=array)
    assert dump_of(tmp_path / "b.npz").values.tolist() == array.tolist()


@pytest.mark.parametrize("kind", ["V2", np.uint16])
def test_array_that_lost_its_type_is_read_as_the_user_says(tmp_path: Path, kind: Any) -> None:
    states = torch.from_numpy(ROWS).to(torch.bfloat16)
    path = saved(tmp_path / "a", states.view(torch.uint16).numpy().view(kind))
    error = error_of(path)
    assert isinstance(error, OptionError)
    assert "--states-dtype bfloat16 or float16" in str(error)
    assert isinstance(error_of(path, dtype="float32"), OptionError)
    dump = dump_of(path, dtype="bfloat16")
    assert dump.values.dtype == torch.bfloat16
    assert torch.equal(dump.values, states)
    half = saved(tmp_path / "b", torch.from_numpy(ROWS).half().view(torch.uint16).numpy().view(kind))
    assert torch.equal(dump_of(half, dtype="float16").values, torch.from_numpy(ROWS).half())


def test_third_dimension_is_prompts_or_the_layers_the_user_names(tmp_path: Path) -> None:
    array = np.stack([ROWS, ROWS + 1, ROWS + 2])
    path = saved(tmp_path / "a.npy", array)
    prompts = dumps_of(path)
    assert [d.name for d in prompts] == [f"a.npy: prompt {i}" for i in range(3)]
    assert "say --layers" in " ".join(prompts[0].notes)
    assert dump_of(path, prompt=2).values.tolist() == array[2].tolist()
    layers = dumps_of(path, layers=(5, 1, 9))
    assert [d.layer for d in layers] == [5, 1, 9]
    assert [d.values.tolist() for d in layers] == array.tolist()
    inner = dumps_of(saved(tmp_path / "b.npy", array.transpose(1, 0, 2)), layers=(5, 1, 9))
    assert [d.values.tolist() for d in inner] == array.tolist()
    assert isinstance(error_of(saved(tmp_path / "c.npy", array[:, :3]), layers=(5, 1, 9)), ShapeError)


def test_joined_width_is_cut_into_the_layers_the_user_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", np.concatenate([ROWS, ROWS + 1, ROWS + 2], 1))
    found = dumps_of(path, layers=(2, 18, 33))
    assert [(d.layer, d.site) for d in found] == [(2, "block"), (18, "block"), (33, "block")]
    assert [d.values.tolist() for d in found] == [ROWS.tolist(), (ROWS + 1).tolist(), (ROWS + 2).tolist()]
    assert dump_of(path, layers=(2, 18, 33), layer=18).values.tolist() == (ROWS + 1).tolist()
    assert dump_of(path).values.shape == (6, 12)
    assert isinstance(error_of(path, layers=(1, 2, 3, 4, 5)), ShapeError)


def test_names_of_archives_and_safetensors_are_keys(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", first=ROWS, second=ROWS + 1, token_ids=np.arange(6))
    save_file(
        {"first": torch.from_numpy(ROWS), "second": torch.from_numpy(ROWS + 1), "token_ids": torch.arange(6)},
        tmp_path / "b.safetensors",
    )
    for path in (tmp_path / "a.npz", tmp_path / "b.safetensors"):
        found = dumps_of(path)
        assert [d.name for d in found] == [f"{path.name}: first", f"{path.name}: second"]
        assert [d.input_ids for d in found] == [tuple(range(6))] * 2
        assert dump_of(path, key="second").values.tolist() == (ROWS + 1).tolist()
        assert "first, second" in str(error_of(path, key="third"))


def test_float8_without_scales_is_noted(tmp_path: Path) -> None:
    states = torch.from_numpy(ROWS).to(torch.float8_e5m2)
    save_file({"x": states}, tmp_path / "a")
    dump = dump_of(tmp_path / "a")
    assert (dump.rounded, dump.values.dtype) == ("float8_e5m2", torch.float32)
    assert torch.equal(dump.values, states.float())


def test_one_bad_name_does_not_stop_the_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=ROWS, b=np.array([{}], object), c=np.full_like(ROWS, np.inf), d=ROWS)
    kinds = [type(item).__name__ for item in all_of(tmp_path / "a.npz")]
    assert kinds == ["Dump", "InputError", "NonFiniteError", "Dump"]


MALFORMED: dict[str, Any] = {
    "objects": np.array([{}, {}], object),
    "text": np.array(["a prompt"]),
    "complex": ROWS.astype(np.complex64),
    "booleans": ROWS > 0,
    "fields": np.zeros((3, 4), [("x", "<f4")]),
    "long double": ROWS.astype(np.longdouble),
    "vector": ROWS[0],
    "scalar": np.float32(1),
    "no rows": ROWS[:0],
    "rank 4": ROWS[None, None],
    "infinity": np.full_like(ROWS, np.inf),
    "three raw bytes": np.zeros((3, 4), "V3"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_array_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "objects":
        with (tmp_path / "a").open("wb") as stream:
            np.save(stream, MALFORMED[kind], allow_pickle=True)
    else:
        saved(tmp_path / "a", MALFORMED[kind])
    error = error_of(tmp_path / "a")
    assert isinstance(error, InputError)
    assert kind != "infinity" or isinstance(error, NonFiniteError)


def test_header_that_promises_more_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    for shape in ((1 << 40, 1 << 20), (-1, 4), (1 << 70, 2)):
        with (tmp_path / "a").open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
            stream.write(bytes(64))
        assert isinstance(error_of(tmp_path / "a"), InputError)
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        raw = saved(tmp_path / "c", np.zeros((1 << 10, 1 << 10), np.float32)).read_bytes()
        archive.writestr("x.npy", raw)
    assert "times its size" in str(error_of(tmp_path / "b.npz"))


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors"])
def test_cut_off_file_is_refused_at_every_length(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "npy":
        saved(path, ROWS)
    elif ending == "npz":
        np.savez(path, x=ROWS)
    else:
        save_file({"x": torch.from_numpy(ROWS)}, path)
    raw = path.read_bytes()
    for length in range(0, len(raw), 3):
        path.write_bytes(raw[:length])
        assert isinstance(error_of(path), SipitError)
