"""The closest pairs of captured states at every layer, each layer kept in a log as soon as it is searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sipit.collisions import LayerSurvey, StateFolder, float64_distances, in_float64, survey_layers
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.storage import LineLog
from sipit.workers import Here, Workers

_CONFIRMED = 3  # closest pairs of a layer run again in float64


def logged_surveys(
    lm: LanguageModel,
    folder: StateFolder,
    cuts: Sequence[Cut],
    *,
    log: LineLog,
    k: int,
    threshold: float,
    memory: int,
    is_full: bool,
    workers: Workers | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the record of each layer: first those that the log holds for these settings, then the rest, as searched.

    Args:
        lm: the model whose states they are.
        folder: the states.
        cuts: the layers.
        log: keeps what was found.
        k: closest pairs a layer.
        threshold: L2 at which a pair is a collision.
        memory: bytes that a search may take.
        is_full: whether the distribution over all pairs is made.
        workers: who searches, a layer at a time, where the folder can be read; None: this process.
        on_step: told how many of the layers that were left are done.

    Raises:
        StorageError: the log cannot be written.
    """
    settings: dict[str, Any] = {"k": k, "threshold": threshold, "is_full": is_full}
    known = {field.name for field in fields(LayerSurvey)} | {"settings"}
    kept = {_cut(x): x for x in log.records() if x.get("settings") == settings and known <= set(x)}
    yield from (kept[cut] for cut in cuts if cut in kept)
    waiting = [cut for cut in cuts if cut not in kept]
    if not waiting:
        return
    pieces = [_Layer(path=folder.path.resolve(), cut=cut, memory=memory, **settings) for cut in waiting]
    found = (workers or Here(lm)).results(_searched, pieces)
    for number, layer in enumerate(found, start=1):
        record = {"settings": settings, **layer}
        log.append(record)
        yield record
        if on_step is not None:
            on_step(number, len(waiting))


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer of a folder to be searched."""

    path: Path
    cut: Cut
    k: int
    threshold: float
    memory: int
    is_full: bool


def _searched(lm: LanguageModel, layer: _Layer) -> dict[str, Any]:
    folder = StateFolder(layer.path)
    (found,) = survey_layers(
        folder,
        cuts=[layer.cut],
        k=layer.k,
        threshold=layer.threshold,
        memory=layer.memory,
        is_full=layer.is_full,
    )
    return _with_texts(asdict(found), folder, lm.derived("in float64", lambda: in_float64(lm)))


def _cut(record: dict[str, Any]) -> Any:
    return record.get("layer"), record.get("site")


def _with_texts(layer: dict[str, Any], folder: StateFolder, wide: LanguageModel) -> dict[str, Any]:
    """Add to each closest pair its prompts, and to the first few their distance in float64 arithmetic."""
    for key in ("closest", "closest_varied"):
        for number, pair in enumerate(layer[key]):
            both = folder.prompt(pair["first"]), folder.prompt(pair["second"])
            for end, ids in zip(("first", "second"), both, strict=True):
                pair |= {f"{end}_ids": ids.tolist(), f"{end}_text": wide.decode(ids)}
            cut = Cut(layer["layer"], layer["site"])
            pair["float64_distance"] = float64_distances(wide, [both], cut)[0] if number < _CONFIRMED else None
    layer["spread"]["median"] = dict(layer["spread"]["percentiles"])[50]
    return layer
