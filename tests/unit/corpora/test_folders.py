"""Local files are read whole, in a seeded order, and nothing unreadable passes in silence."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest

from sipit.corpora import LocalTexts
from sipit.corpora.folders import PIECE
from sipit.errors import InputError, StorageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight texts, two of them code, a file of bytes, one of NULs, and two hidden ones."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"text {number}", encoding="utf-8")
    (tmp_path / "deep" / "one.py").write_text("one = 'é'", encoding="utf-8")
    (tmp_path / "deep" / "er" / "two.py").write_bytes(b"two = 2\r\n")
    (tmp_path / "deep" / "picture.txt").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "deep" / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    return tmp_path


TEXTS = {f"text {number}" for number in range(6)}
CODE = {"one = 'é'", "two = 2\r\n"}


def test_folder_gives_every_text_once_and_counts_what_is_none(folder: Path) -> None:
    texts = LocalTexts(folder, seed=0)
    assert sorted(texts) == sorted(TEXTS | CODE)
    assert (texts.n_files, texts.n_skipped) == (8, 2)


def test_suffixes_choose_files(folder: Path) -> None:
    texts = LocalTexts(folder, seed=0, suffixes=(".py", ".md"))
    assert set(texts) == CODE
    assert (texts.n_files, texts.n_skipped) == (2, 0)


def test_one_suffix_may_stand_alone(tmp_path: Path) -> None:
    for name in ("a.txt", "b.rst"):  # of one letter at the end
        (tmp_path / name).write_text(name)
    assert list(LocalTexts(tmp_path, seed=0, suffixes=".txt")) == ["a.txt"]


def test_order_follows_the_seed(folder: Path) -> None:
    assert list(LocalTexts(folder, seed=1)) == list(LocalTexts(folder, seed=1))
    assert len({tuple(LocalTexts(folder, seed=seed)) for seed in range(5)}) > 1


def test_pieces_of_a_long_file_join_to_the_file(tmp_path: Path) -> None:
    content = "é\r\n東x" * PIECE  # letters of one to three bytes, five pieces exactly
    path = tmp_path / "long.txt"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    pieces = list(LocalTexts(path, seed=0))
    assert "".join(pieces) == content
    assert max(map(len, pieces)) <= PIECE


def test_long_file_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(str(number) * (4 * PIECE if number == 2 else 10))
    for seed in range(5):
        assert {text[0] for text in islice(LocalTexts(tmp_path, seed=seed), 5)} == set("01234")


def test_file_that_breaks_off_late_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "late.txt").write_bytes(b"a" * (3 * PIECE) + b"\xff")
    texts = LocalTexts(tmp_path, seed=0)
    assert list(texts) == ["good"]
    assert texts.n_skipped == 1


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent.*check its name"):
        LocalTexts(tmp_path / "absent", seed=0)
    with pytest.raises(StorageError, match="too long"):
        LocalTexts(tmp_path / ("n" * 300), seed=0)


def test_file_that_vanishes_is_an_error_not_a_gap(folder: Path) -> None:
    texts = LocalTexts(folder, seed=0)
    (folder / "3.txt").unlink()
    with pytest.raises(StorageError, match=r"3\.txt"):
        list(texts)


def test_folder_that_cannot_be_listed_is_an_error_not_a_gap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "er":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="er: Permission denied"):
        LocalTexts(folder, seed=0)


def test_named_file_that_is_not_text_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="not a file of UTF-8 text"):
        LocalTexts(folder / "deep" / "picture.txt", seed=0)


def test_folder_without_such_files_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no file that ends in \.md or \.rst"):
        LocalTexts(folder, seed=0, suffixes=(".md", ".rst"))
