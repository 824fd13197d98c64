"""Activations that SAELens caches: a folder of Arrow streams, a row a context, a column a hook.

A context is of fixed length, (T, D), and may hold several documents with a BOS token between them: its first rows are
those of a prompt all the same. `token_ids` lie beside. A run that was not finished leaves its shards in `.tmp_shards`.

Source: SAELens' cache_activations_runner.py; Hugging Face datasets' save_to_disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sipit.errors import InputError, OptionError, ShapeError, StorageError
from sipit.observations.formats.dump import Dump, EachInTurn, Wanted, brief, file_name, shortened
from sipit.observations.formats.rows import ids_of, is_wanted, one_prompt, refuse_unused, require_same_length
from sipit.observations.formats.tensors import place_of_hook
from sipit.storage import read_json

_IDS, _UNFINISHED = "token_ids", ".tmp_shards"


class SaeLensFormat:
    """A folder of cached activations."""

    name = "SAELens activations"

    def sniff(self, path: Path) -> bool:
        """Return whether a folder holds a saved data set, or what an unfinished run left."""
        try:
            is_saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
            return is_saved or (path / _UNFINISHED).is_dir()
        except OSError:
            return False

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield the states of each context at each hook."""
        return EachInTurn(path, _contexts(path, wanted))


def _contexts(path: Path, wanted: Wanted) -> Iterator[Callable[[], Dump]]:
    name = file_name(path)
    refuse_unused(name, wanted, "layers")
    if not (path / "state.json").is_file():
        raise InputError(f"{name} is an unfinished run of SAELens ({_UNFINISHED}); let it end, it goes on where it was")
    try:
        import pyarrow as pa
    except ImportError as error:
        raise StorageError(f"{name} is an Arrow folder, which needs pyarrow: install sipit[datasets]") from error
    number = 0
    for file in _files(path, name):
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                hooks = _hooks(stream.schema.names, wanted, name)
                for table in stream:
                    for row in range(table.num_rows):
                        if wanted.prompt in (None, number):
                            title = f"{name}: prompt {number}"
                            for hook in hooks:
                                yield partial(_dump, title, table, row, hook, wanted)
                        number += 1
        except pa.ArrowException as error:
            raise InputError(f"{name}: {file.name} is no whole Arrow stream ({brief(error)}); copy it again") from error
    if wanted.prompt is not None and wanted.prompt >= number:
        raise OptionError(f"{name} holds prompts 0 to {number - 1}; --prompt {wanted.prompt} is not there")


def _files(path: Path, name: str) -> list[Path]:
    try:
        listed: Any = read_json(path / "state.json")["_data_files"]
        files = [path / Path(str(entry["filename"])).name for entry in listed]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: state.json does not list its files ({brief(error)}); copy the folder again"
        ) from error
    absent = next((file.name for file in files if not file.is_file()), None)
    if absent is not None or not files:
        raise InputError(f"{name} lacks {shortened(absent) if absent else 'all of its files'}; copy the folder again")
    return files


def _hooks(columns: list[str], wanted: Wanted, name: str) -> list[str]:
    """Return the columns to read: the one named, else each whose name is a hook at the place asked for."""
    if wanted.key is not None:
        if wanted.key not in columns:
            raise OptionError(f"{name} has no {wanted.key[:60]!r}; --key may be one of {', '.join(columns)[:120]}")
        return [wanted.key]
    places = {column: place_of_hook(column) for column in columns if column != _IDS}
    found = [column for column, place in places.items() if place is not None and is_wanted(place, wanted)]
    if not found:
        named = ", ".join(places)[:120]
        raise OptionError(f"{name} holds {named or 'no states'}: none is the place asked for; say --key and --layer")
    return found


def _dump(title: str, table: Any, row: int, hook: str, wanted: Wanted) -> Dump:
    column = table.column(hook)
    column = getattr(column, "storage", column)  # an array of fixed shape is a list of lists in an extension
    stored = column.slice(row, 1).flatten()
    n_rows = len(stored)
    values = torch.tensor(stored.flatten().to_numpy(zero_copy_only=False))
    if not n_rows or values.numel() % n_rows:
        raise ShapeError(f"{title}: {hook[:60]} is no matrix of rows; have SAELens write it again")
    ids = None
    if _IDS in table.schema.names:
        ids = ids_of(table.column(_IDS)[row].as_py(), f"{title}: {_IDS}")
        require_same_length(n_rows, ids, title)
    place = place_of_hook(hook)
    told = () if place is None else (f"layer {place[0]} (by the hook's name)",)
    return one_prompt(
        f"{title}: {hook}",
        values.view(n_rows, -1),
        wanted,
        place,
        input_ids=ids,
        notes=(*told, "a context of fixed length: it may hold several documents"),
    )
