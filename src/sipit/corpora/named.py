"""From a name to texts: the standard library, a hub data set, or a local file or folder."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterator, Mapping
from itertools import chain, zip_longest
from pathlib import Path

from sipit.corpora.folders import LocalTexts
from sipit.corpora.hub import HUB_DATASETS, SHUFFLE_BUFFER, hub_commit, hub_texts, require_datasets
from sipit.corpora.standard_library import library_code, library_prose
from sipit.errors import OptionError

_LIBRARY = {
    "library": "prose and code of Python's standard library in turn",
    "library-prose": "docstrings and language topics of Python's standard library",
    "library-code": "modules of Python's standard library",
}
CORPORA = (*_LIBRARY, *HUB_DATASETS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts, and what a record must say for them to be drawn again."""

    name: str
    revision: str | None  # commit of a hub data set
    source: str  # in words
    seed: int
    details: Mapping[str, str | int | None]  # where it lies, version of what it depends on
    texts: Iterator[str]  # can be read once

    def describe(self) -> dict[str, str | int | None]:
        """Return JSON values: what was read and how to read it again; file counts are those so far."""
        record: dict[str, str | int | None] = {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "seed": self.seed,
            **self.details,
        }
        if isinstance(self.texts, LocalTexts):
            record |= {"n_files": self.texts.n_files, "n_skipped": self.texts.n_skipped}
        return record


def corpus(name: str, *, seed: int, revision: str | None = None) -> Corpus:
    """Return the corpus of a name, its texts in an order drawn from the seed.

    Args:
        name: one of `CORPORA`, "file:PATH", or the path of a file or folder that exists.
        seed: of the order.
        revision: of a hub data set: branch, tag or commit; None for its newest commit.

    Raises:
        OptionError: no such corpus; a revision without a hub data set; the `datasets` package is missing.
        FetchError: the hub cannot be reached.
        InputError: the file is not text, or the folder is empty.
        StorageError: the path cannot be read.
    """
    if name in HUB_DATASETS:
        return _from_hub(name, seed, revision)
    if revision is not None:
        raise OptionError(f"corpus {name!r} has no revisions; only {', '.join(HUB_DATASETS)} have")
    if name in _LIBRARY:
        details = {"python": platform.python_version()}
        return Corpus(
            name=name, revision=None, source=_LIBRARY[name], seed=seed, details=details, texts=_library(name, seed)
        )
    path = name.removeprefix("file:")
    if not path or (path == name and not _exists(path)):
        raise OptionError(
            f"{name!r} is neither a corpus nor a path that exists; choose {', '.join(CORPORA)}, or file:PATH"
        )
    texts = LocalTexts(path, seed=seed)
    return Corpus(name=name, revision=None, source="local files", seed=seed, details={}, texts=texts)


def _from_hub(name: str, seed: int, revision: str | None) -> Corpus:
    place = HUB_DATASETS[name]
    library = require_datasets(name)  # before the network: the nearer remedy first
    commit = hub_commit(name, revision)
    details = {
        "hub_name": place.hub_name,
        "config": place.config,
        "split": "train",
        "field": place.field,
        "buffer_size": SHUFFLE_BUFFER,
        "datasets": str(library.__version__),
    }
    texts = hub_texts(name, revision=commit, seed=seed)
    return Corpus(name=name, revision=commit, source=place.source, seed=seed, details=details, texts=texts)


def _library(name: str, seed: int) -> Iterator[str]:
    if name == "library-prose":
        return library_prose(seed=seed)
    if name == "library-code":
        return library_code(seed=seed)
    pairs = zip_longest(library_prose(seed=seed), library_code(seed=seed))
    return (text for text in chain.from_iterable(pairs) if text is not None)


def _exists(path: str) -> bool:
    with contextlib.suppress(OSError):  # a name too long to be a path
        return Path(path).expanduser().exists()
    return False
