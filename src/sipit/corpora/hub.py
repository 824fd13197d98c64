"""The paper's four data sets, streamed from the hub through the optional `datasets` package.

The Pile itself is no longer distributed: "pile-uncopyrighted" is its public subset, and results on it
are results on that subset.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from sipit.errors import FetchError, InputError, OptionError

SHUFFLE_BUFFER = 10_000  # documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubDataset:
    """Where a data set lies on the hub, and which field of its rows holds the text. Split: train."""

    hub_name: str
    config: str | None
    field: str
    source: str  # in words
    needs: tuple[str, ...] = ()  # packages beside `datasets` that read its files


# name here → place; source: arXiv 2510.15511, section 4.1
HUB_DATASETS = {
    "wikipedia": HubDataset(
        hub_name="wikimedia/wikipedia", config="20231101.en", field="text", source="English Wikipedia, November 2023"
    ),
    "c4": HubDataset(hub_name="allenai/c4", config="en", field="text", source="C4, English web pages"),
    "pile-uncopyrighted": HubDataset(
        hub_name="monology/pile-uncopyrighted",
        config=None,
        field="text",
        source="public subset of the Pile",
        needs=("zstandard",),  # JSON lines in .zst, which `datasets` calls unsupported without it
    ),
    "python-github-code": HubDataset(
        hub_name="angie-chen55/python-github-code", config=None, field="code", source="Python files from GitHub"
    ),
}


def hub_commit(name: str, revision: str | None = None) -> str:
    """Return the commit a revision of a data set stands at now, so that a record can name it.

    Args:
        name: one of `HUB_DATASETS`.
        revision: branch, tag or commit; None for the main branch. A full commit is returned unasked.

    Raises:
        FetchError: the hub cannot be reached, or has no such data set or revision.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    hub_name = HUB_DATASETS[name].hub_name
    try:
        commit = HfApi().dataset_info(hub_name, revision=revision).sha
    except Exception as error:  # three network libraries lie below, without a common base class
        raise _unreachable(f"find the commit of {hub_name!r} at revision {revision or 'main'!r}", error) from error
    if commit is None:
        raise FetchError(f"the hub names no commit for {hub_name!r}; pass a full one as the revision")
    return commit


def hub_texts(name: str, *, revision: str, seed: int, buffer_size: int = SHUFFLE_BUFFER) -> Iterator[str]:
    """Open the stream of a data set at once and return its texts, shuffled by the seed as they come.

    Args:
        name: one of `HUB_DATASETS`.
        revision: commit to read; see `hub_commit`.
        seed: of the order of the data set's files and of the shuffle.
        buffer_size: documents held in memory to shuffle among.

    Raises:
        OptionError: the `datasets` package is not installed.
        FetchError: the hub cannot be reached, now or in the middle of the stream.
        InputError: a row lacks the text.
    """
    place = HUB_DATASETS[name]
    load_dataset = require_datasets(name).load_dataset
    try:
        rows = load_dataset(place.hub_name, name=place.config, split="train", revision=revision, streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=buffer_size)
    except Exception as error:
        raise _unreachable(f"open the data set {place.hub_name!r} at revision {revision}", error) from error
    return _texts(rows, place)


def require_datasets(name: str) -> Any:
    """Import what a data set is read with, and return the `datasets` package.

    Raises:
        OptionError: a package is not installed, or not whole.
    """
    for package in (*HUB_DATASETS[name].needs, "datasets"):
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise OptionError(
                f"corpus {name!r} is streamed by the package {package!r}, which cannot be imported here ({error}); "
                "install it with \"pip install 'sipit[datasets]'\", or choose a library corpus or a file"
            ) from error
    return module


def _texts(rows: Iterable[dict[str, Any]], place: HubDataset) -> Iterator[str]:
    stream = iter(rows)
    n_read = 0
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise _unreachable(f"go on reading {place.hub_name!r} after {n_read} documents", error) from error
        text = row.get(place.field)
        if not isinstance(text, str):
            raise InputError(
                f"document {n_read} of {place.hub_name!r} has no text in its field {place.field!r} (fields: "
                f"{', '.join(row)}); the data set has changed, pass an earlier revision"
            )
        n_read += 1
        yield text


def _unreachable(attempt: str, error: Exception) -> FetchError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return FetchError(
        f"cannot {attempt} on the hub ({lines[0][:200].rstrip('. ')}); check the connection and the revision, or "
        "choose a library corpus or a file"
    )
