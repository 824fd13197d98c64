"""Hidden states that vLLM's extraction connector writes, and speculators' new files, which are the same moved.

One safetensors file a request: `hidden_states` (T, n, D) and `token_ids` (T,). The captured layer ids are in no
file; columns rise by layer, and an id counts the blocks run (offset 0). A float8 variant adds one scale a row.
With a prefix-cache hit there are fewer rows than ids: the rows are the last ones.

Source: vLLM's example_hidden_states_connector.py; speculators' scripts/data_generation_offline.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipit.errors import InputError, OptionError, ShapeError, StorageError
from sipit.observations.formats.dump import Dump, EachInTurn, Wanted, file_name
from sipit.observations.formats.rows import (
    chosen_layers,
    chosen_prompts,
    floats_of,
    ids_of,
    name_of,
    settled,
)
from sipit.observations.formats.tensor_file import safetensors_keys
from sipit.storage import open_tensors

_STATES, _IDS, _SCALES = "hidden_states", "token_ids", "hidden_states_scales"


class VllmFormat:
    """The `hidden_states` and `token_ids` of one request."""

    name = "vLLM or speculators hidden states"

    def sniff(self, path: Path) -> bool:
        """Return whether a safetensors header names these tensors and no others."""
        keys = set(safetensors_keys(path) or ())
        return {_STATES, _IDS} <= keys <= {_STATES, _IDS, _SCALES}

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield a dump for each captured layer, by rising layer."""
        return EachInTurn(path, _columns(path, wanted))


def _columns(path: Path, wanted: Wanted) -> Iterator[Callable[[], Dump]]:
    name = file_name(path)
    if wanted.key not in (None, _STATES):
        raise OptionError(f"{name} holds states under {_STATES!r} alone, not under {wanted.key!r}; leave --key out")
    chosen_prompts(1, wanted, name)
    with _not_being_written(path), open_tensors(path) as stream:
        shape = tuple(stream.get_slice(_STATES).get_shape())
        if len(shape) not in (2, 3):
            raise ShapeError(
                f"{name}: {_STATES} has shape {shape}, expected (tokens, layers, width); have vLLM write it again"
            )
        n_columns = shape[1] if len(shape) == 3 else 1
        ids, suffix = _ids(stream.get_tensor(_IDS), shape[0], name)
        scales = stream.get_tensor(_SCALES) if _SCALES in stream.keys() else None  # noqa: SIM118 - not a dictionary
        for column, layer in enumerate(chosen_layers(n_columns, wanted, name, are_sorted=True)):
            if wanted.layer in (None, layer):
                title = (
                    name if n_columns == 1 else f"{name}: {f'column {column}' if layer is None else f'layer {layer}'}"
                )
                note = (
                    f"layer not in the file, column {column} of {n_columns} by rising layer: say --layers"
                    if layer is None
                    else f"layer {layer} (declared {layer}, +0), column {column} of {n_columns}"
                )
                base = Dump(
                    name=title,
                    values=torch.empty(0, 0),
                    layer=layer,
                    site="block",
                    input_ids=ids,
                    positions_from=suffix,
                    notes=(note, "site block: before the final norm"),
                )
                yield partial(_column, stream, column, scales, base, wanted)


def _column(stream: Any, column: int, scales: Tensor | None, base: Dump, wanted: Wanted) -> Dump:
    part = stream.get_slice(_STATES)
    stored = part[:, column] if len(part.get_shape()) == 3 else part[:]
    values, rounded = floats_of(stored, base.name)
    notes = [f"dtype {name_of(stored.dtype)}", _rows_note(base, len(stored))]
    row_scales = None
    if rounded is not None:
        if scales is None:
            raise InputError(
                f"{base.name} holds {rounded} values without {_SCALES}: their size is lost; "
                "ask for the raw run, or for the file with its scales"
            )
        row_scales = _scales(scales, len(stored), base.name)
        values = values * row_scales[:, None]
        notes.append("scale: one factor a row, multiplied in")
    return settled(
        replace(base, values=values, scales=row_scales, rounded=rounded, notes=base.notes + tuple(notes)), wanted
    )


def _rows_note(base: Dump, rows: int) -> str:
    if base.positions_from:
        return f"rows {rows}, a suffix from position {base.positions_from} (prefix-cache hit)"
    return f"rows {rows}" + ("" if base.input_ids is not None else ", no ids beside (prompt given as embeddings)")


def _ids(stored: Tensor, rows: int, name: str) -> tuple[tuple[int, ...] | None, int | None]:
    """Return the ids beside the rows, none where the prompt was given as embeddings, and the first position held."""
    ids = ids_of(stored, f"{name}: {_IDS}")
    if ids and len(ids) < rows:
        raise InputError(
            f"{name} holds {rows} rows beside {len(ids)} token ids: they do not belong together; "
            "have its producer write it again"
        )
    return ids or None, len(ids) - rows if len(ids) > rows else None


def _scales(stored: Tensor, rows: int, name: str) -> Tensor:
    scales = stored.to(torch.float32).flatten()
    if scales.shape[0] != rows or not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise InputError(
            f"{name}: {_SCALES} of shape {tuple(stored.shape)} is not one positive number for each of {rows} rows; "
            "have its producer write it again"
        )
    return scales


@contextlib.contextmanager
def _not_being_written(path: Path) -> Iterator[None]:
    """Hold the writer's lock file shared while the file is read, where there is one.

    Raises:
        StorageError: the writer still holds it.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    if not lock.is_file():
        yield
        return
    with lock.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"{file_name(path)} is still being written; try again when it is done") from error
        yield
