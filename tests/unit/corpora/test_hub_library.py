"""The real `datasets` library streams what our call asks for: folders laid out as the paper's data sets are."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sipit.corpora import HUB_DATASETS, corpus
from sipit.errors import FetchError, InputError

datasets = pytest.importorskip("datasets")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = [f"document {i}" for i in range(40)]
Rows = Sequence[dict[str, Any]]
Write = Callable[[Path, Rows], None]


def _parquet(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _json_gz(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress(_lines(rows)))


def _json_zst(path: Path, rows: Rows) -> None:
    path.write_bytes(pytest.importorskip("zstandard").compress(_lines(rows)))


# name → folder of the files in the repository, their ending, how they are written
LAYOUTS: dict[str, tuple[str, str, Write]] = {
    "wikipedia": ("20231101.en", "parquet", _parquet),
    "c4": ("en", "json.gz", _json_gz),
    "pile-uncopyrighted": ("train", "jsonl.zst", _json_zst),
    "python-github-code": ("data", "parquet", _parquet),
}


@pytest.fixture
def lay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what writes a local stand-in of a data set, in two files, and lets our table point to it."""

    def write(name: str, *, field: str | None = None) -> None:
        place = HUB_DATASETS[name]
        folder, ending, write_file = LAYOUTS[name]
        rows = [{"id": i, field or place.field: text} for i, text in enumerate(TEXTS)]
        (tmp_path / folder).mkdir()
        for number, part in enumerate((rows[:25], rows[25:])):
            write_file(tmp_path / folder / f"train-{number:05d}-of-00002.{ending}", part)
        if place.config is not None:  # beside it another config, which must not be read
            (tmp_path / "other").mkdir()
            write_file(tmp_path / "other" / f"train-00000-of-00001.{ending}", [{"id": 0, place.field: "another"}])
            configs = "".join(
                f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {where}/train-*\n"
                for config, where in ((place.config, folder), ("other", "other"))
            )
            (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", "utf-8")
        monkeypatch.setitem(HUB_DATASETS, name, dataclasses.replace(place, hub_name=str(tmp_path)))

    return write


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_text_is_streamed_once_in_an_order_drawn_from_the_seed(lay_out: Callable[..., None], name: str) -> None:
    lay_out(name)
    made = corpus(name, seed=5, revision=COMMIT)
    texts = list(made.texts)
    assert texts != TEXTS
    assert sorted(texts) == sorted(TEXTS)
    assert list(corpus(name, seed=5, revision=COMMIT).texts) == texts
    assert list(corpus(name, seed=6, revision=COMMIT).texts) != texts
    record = json.loads(json.dumps(made.describe()))
    assert (record["revision"], record["datasets"]) == (COMMIT, datasets.__version__)
    assert (record["config"], record["field"]) == (HUB_DATASETS[name].config, HUB_DATASETS[name].field)


def test_damaged_file_is_an_error_not_an_end(lay_out: Callable[..., None], tmp_path: Path) -> None:
    lay_out("c4")
    (tmp_path / "en" / "train-00001-of-00002.json.gz").write_bytes(b"no gzip at all")
    with pytest.raises(FetchError, match=r"go on reading .* after \d+ documents"):
        list(corpus("c4", seed=0, revision=COMMIT).texts)


def test_changed_field_and_absent_config_are_told(
    lay_out: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out("c4", field="content")
    with pytest.raises(InputError, match=r"no text in its field 'text' \(fields: id, content\)"):
        next(corpus("c4", seed=0, revision=COMMIT).texts)
    monkeypatch.setitem(HUB_DATASETS, "c4", dataclasses.replace(HUB_DATASETS["c4"], config="fr"))
    with pytest.raises(FetchError, match=r"cannot open the data set .*'fr'"):
        corpus("c4", seed=0, revision=COMMIT)
