"""What vLLM's extraction connector and speculators write is read column by column, with nothing guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sipit.errors import InputError, NonFiniteError, OptionError, ShapeError, StorageError
from tests.unit.observations.formats.reading import all_of, dump_of, dumps_of, error_of


def states(rows: int = 5, columns: int = 3, width: int = 4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, width, generator=torch.Generator().manual_seed(7)).to(dtype)


def written(path: Path, values: Tensor, ids: Tensor | None = None, **more: Tensor) -> Path:
    """A file laid out as the connector lays it out: these keys, no metadata."""
    ids = torch.arange(10, 10 + values.shape[0]) if ids is None else ids
    save_file({"hidden_states": values, "token_ids": ids, **more}, path)
    return path


def in_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """The float8 backend: one scale a row for all its layers, its largest magnitude over 448."""
    scales = values.float().flatten(1).abs().amax(1, keepdim=True) / 448
    return (values.float() / scales[:, :, None]).to(torch.float8_e4m3fn), scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_columns_are_the_layers_the_user_names(tmp_path: Path, dtype: torch.dtype) -> None:
    values = states(dtype=dtype)
    # No ending and no telling name: the content decides.
    found = dumps_of(written(tmp_path / "request-1", values), layers=(2, 18, 36))
    assert [dump.layer for dump in found] == [2, 18, 36]
    for column, dump in enumerate(found):
        assert torch.equal(dump.values, values[:, column])
        assert dump.values.dtype == dtype
        assert (dump.site, dump.choices, dump.scales, dump.rounded, dump.positions_from) == (
            "block",
            (),
            None,
            None,
            None,
        )
        assert dump.input_ids == (10, 11, 12, 13, 14)
    assert "declared 18, +0" in " ".join(found[1].notes)


def test_columns_rise_by_layer_whatever_order_was_asked_for(tmp_path: Path) -> None:
    values = states()
    found = dumps_of(written(tmp_path / "a", values), layers=(36, 2, 18))
    assert [dump.layer for dump in found] == [2, 18, 36]
    assert torch.equal(found[2].values, values[:, 2])


def test_one_layer_of_several_is_read_alone(tmp_path: Path) -> None:
    values = states()
    dump = dump_of(written(tmp_path / "a", values), layers=(2, 18, 36), layer=18)
    assert torch.equal(dump.values, values[:, 1])


def test_unnamed_columns_have_no_layer_and_say_so(tmp_path: Path) -> None:
    found = dumps_of(written(tmp_path / "a.safetensors", states()))
    assert [dump.layer for dump in found] == [None] * 3
    assert [dump.name for dump in found] == [f"a.safetensors: column {i}" for i in range(3)]
    assert all("layer not in the file" in dump.notes[0] for dump in found)


def test_layer_alone_does_not_say_which_of_several_columns(tmp_path: Path) -> None:
    assert "--layers" in str(error_of(written(tmp_path / "a", states()), layer=5))


def test_only_column_is_the_layer_the_user_says(tmp_path: Path) -> None:
    assert dump_of(written(tmp_path / "a", states(columns=1)), layer=5).layer == 5
    assert dump_of(written(tmp_path / "b", states(columns=1)[:, 0].contiguous()), layer=5).layer == 5


def test_float8_values_are_multiplied_by_the_scale_of_their_row(tmp_path: Path) -> None:
    values, scales = in_float8(states(dtype=torch.float32))
    found = dumps_of(written(tmp_path / "a", values, hidden_states_scales=scales), layers=(2, 18, 36))
    for column, dump in enumerate(found):
        assert torch.equal(dump.values, torch.stack([values[t, column].float() * scales[t, 0] for t in range(5)]))
        assert dump.rounded == "float8_e4m3fn"
        assert dump.scales is not None
        assert torch.equal(dump.scales, scales[:, 0])


def test_fewer_rows_than_ids_are_the_last_ones(tmp_path: Path) -> None:
    dump = dump_of(written(tmp_path / "a", states(columns=1), torch.arange(9)))
    assert dump.positions_from == 4
    assert dump.input_ids == tuple(range(9))
    assert "suffix from position 4" in " ".join(dump.notes)


def test_prompt_given_as_embeddings_has_no_ids(tmp_path: Path) -> None:
    dump = dump_of(written(tmp_path / "a", states(columns=1), torch.empty(0, dtype=torch.int64)))
    assert dump.input_ids is None
    assert dump.positions_from is None


def test_ids_are_not_shown_by_accident(tmp_path: Path) -> None:
    dump = dump_of(written(tmp_path / "a", states(columns=1), torch.tensor([4242] * 5)))
    assert "4242" not in repr(dump)


def test_file_that_is_being_written_waits(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    path = written(tmp_path / "a", states(columns=1))
    lock = tmp_path / "a.lock"
    lock.touch()
    with lock.open("wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        error = error_of(path)
        assert isinstance(error, StorageError)
        assert "still being written" in str(error)
    assert dump_of(path).values.shape == (5, 4)


def test_one_bad_column_does_not_stop_the_others(tmp_path: Path) -> None:
    values = states()
    values[3, 1, 2] = float("nan")
    first, bad, last = all_of(written(tmp_path / "a", values))
    assert isinstance(bad, NonFiniteError)
    assert "row 3" in str(bad)
    assert "column 1" in str(bad)
    assert not isinstance(first, Exception)
    assert not isinstance(last, Exception)


def test_one_bad_file_of_a_folder_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        written(folder / f"{name}.safetensors", states(columns=1))
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-5])
    (folder / "a.safetensors.lock").touch()
    (folder / "settings.json").write_text("{}")
    (folder / ".hidden.safetensors").write_bytes(b"x")
    first, bad, last = all_of(folder)
    assert isinstance(bad, InputError)
    assert "b.safetensors" in str(bad)
    assert [getattr(first, "name", 0), getattr(last, "name", 0)] == ["a.safetensors", "inner/c.safetensors"]


def test_nothing_and_unknown_content_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "poem.txt").write_text("to be or not to be")
    (tmp_path / "blank").touch()
    assert isinstance(error_of(tmp_path / "empty"), InputError)
    assert isinstance(error_of(tmp_path / "absent"), StorageError)
    for name in ("poem.txt", "blank"):
        assert "none of the tools" in str(error_of(tmp_path / name))


NAN_SCALES = torch.full((5, 1), float("nan"))
MALFORMED = {
    "rank 4": (states()[None], None, {}, ShapeError),
    "rank 1": (states()[0, 0], None, {}, ShapeError),
    "no rows": (states()[:0], None, {}, ShapeError),
    "fewer ids than rows": (states(), torch.arange(4), {}, InputError),
    "ids that are floats": (states(), torch.rand(5), {}, InputError),
    "negative ids": (states(), -torch.arange(5), {}, InputError),
    "ids of two rows": (states(), torch.ones(2, 5, dtype=torch.int64), {}, InputError),
    "states that are whole numbers": (states().to(torch.int64), None, {}, InputError),
    "states that are complex": (states(dtype=torch.float32).to(torch.complex64), None, {}, InputError),
    "infinity": (states() / 0, None, {}, NonFiniteError),
    "float8 without scales": (in_float8(states())[0], None, {}, InputError),
    "float8 with scales of another length": (
        *(in_float8(states())[0], None),
        {"hidden_states_scales": torch.ones(4, 1)},
        InputError,
    ),
    "float8 with NaN scales": (in_float8(states())[0], None, {"hidden_states_scales": NAN_SCALES}, InputError),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_file_is_refused(tmp_path: Path, kind: str) -> None:
    values, ids, more, error = MALFORMED[kind]
    path = written(tmp_path / "a", values.contiguous(), ids, **more)
    items = all_of(path)
    assert items
    assert all(isinstance(item, error) for item in items)


def test_cut_off_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = written(tmp_path / "a", states(rows=2, columns=1, width=2))
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        assert isinstance(error_of(path), InputError)


def test_words_that_do_not_fit_the_file_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a", states())
    for wanted in (
        {"layers": (1, 2)},
        {"layers": (1, 2, 2)},
        {"layers": (1, 2, 3), "layer": 4},
        {"prompt": 1},
        {"key": "x"},
    ):
        assert isinstance(error_of(path, **wanted), OptionError)
