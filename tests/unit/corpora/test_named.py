"""A name leads to its texts and to a record that says how to draw them again."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from sipit.corpora import CORPORA, HUB_DATASETS, corpus, library_code, library_prose, standard_library
from sipit.errors import OptionError, StorageError


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the standard library to a few modules: parsing all of it takes seconds."""
    every = standard_library._sources
    monkeypatch.setattr(standard_library, "_sources", lambda *options: every(*options)[:12])


def test_names_are_the_documented_ones() -> None:
    assert [*CORPORA] == ["library", "library-prose", "library-code", *HUB_DATASETS]


@pytest.mark.usefixtures("small_library")
@pytest.mark.parametrize(("name", "reader"), [("library-prose", library_prose), ("library-code", library_code)])
def test_library_corpus_is_the_library_in_the_order_of_the_seed(
    name: str, reader: Callable[..., Iterator[str]]
) -> None:
    assert list(islice(corpus(name, seed=3).texts, 5)) == list(islice(reader(seed=3), 5))


@pytest.mark.thorough
@pytest.mark.usefixtures("small_library")
def test_library_holds_all_prose_and_all_code_in_turn() -> None:
    prose, code = list(library_prose(seed=1)), list(library_code(seed=1))
    texts = list(corpus("library", seed=1).texts)
    assert texts[:20:2] == prose[:10]
    assert texts[1:20:2] == code[:10]
    assert sorted(texts) == sorted(prose + code)


def test_record_of_the_library_names_the_python_version() -> None:
    record = json.loads(json.dumps(corpus("library", seed=7).describe()))
    assert (record["name"], record["seed"], record["revision"]) == ("library", 7, None)
    assert record["python"] == platform.python_version()


def test_path_is_a_corpus_with_and_without_its_prefix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    for name in (f"file:{tmp_path}", str(tmp_path)):
        made = corpus(name, seed=0)
        assert list(made.texts) == ["a text"]
        same = {"source": "local files", "revision": None, "seed": 0, "n_files": 1, "n_skipped": 1}
        assert made.describe() == {"name": name, **same}


def test_name_of_a_corpus_wins_over_a_file_and_the_prefix_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library").write_text("a file")
    monkeypatch.chdir(tmp_path)
    assert "python" in corpus("library", seed=0).describe()
    assert list(corpus("file:library", seed=0).texts) == ["a file"]


def test_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        corpus(f"file:{tmp_path / 'absent'}", seed=0)


@pytest.mark.parametrize("name", ["the-pile", "", "file:", "n" * 5000])
def test_unknown_name_is_refused_with_the_list_of_names(name: str) -> None:
    with pytest.raises(OptionError, match=r"library-prose.*pile-uncopyrighted.*file:PATH"):
        corpus(name, seed=0)


def test_revision_without_a_hub_data_set_is_refused() -> None:
    with pytest.raises(OptionError, match="no revisions"):
        corpus("library", seed=0, revision="main")
