"""States in JSON: SGLang's answers, llama.cpp's embeddings, plain lists of rows; and log-probabilities of a prompt.

SGLang: `meta_info.hidden_states` of a `/generate` answer holds a matrix of the prompt's rows, then a vector for each
decoding step; with a prefix-cache hit the cached rows are missing. llama.cpp: `embedding` holds a row a token where
nothing was pooled. All lie behind the final norm, and none brings token ids.

Source: SGLang's examples/runtime/hidden_states; llama.cpp's examples/embedding and tools/server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipit.errors import InputError, ShapeError
from sipit.observations.formats.dump import Dump, EachInTurn, Place, Wanted, brief, file_name
from sipit.observations.formats.rows import chosen_prompts, one_prompt, refuse_unused
from sipit.observations.formats.tensor_file import first_bytes
from sipit.observations.formats.top_logits import answers_in, of_input_top_logprobs, of_prompt_logprobs
from sipit.storage import parse_json

_MOST_BYTES = 1 << 29  # numbers in Python take several times as much memory as their digits
_LOOKED_AT = 1 << 16
_KEYS = (b'"hidden_states"', b'"embedding"', b'"embeddings"', b'"prompt_logprobs"', b'"input_top_logprobs"')
_ROWS = re.compile(rb"\s*\[\s*\[+\s*-?\d")
_DECIMALS = range(3, 9)  # digits behind the point that a producer may have printed
_UNIT = 1e-4  # nearer to 1 than this all lengths are 1


class JsonFormat:
    """Rows of numbers in a JSON document."""

    name = "JSON states"

    def sniff(self, path: Path) -> bool:
        """Return whether a file begins as JSON that holds states: by its keys, or as a list of rows."""
        head = first_bytes(path, _LOOKED_AT) or b""
        if head.lstrip()[:1] not in (b"{", b"["):
            return False
        return any(key in head for key in _KEYS) or bool(_ROWS.match(head))

    def read(self, path: Path, wanted: Wanted) -> Iterator[Dump]:
        """Yield a dump for each prompt."""
        return EachInTurn(path, _prompts(path, wanted))


@dataclass(frozen=True)
class _Found:
    rows: list[Any]  # a list of numbers each
    place: Place | None
    notes: tuple[str, ...]
    positions_from: int | None = None


def _prompts(path: Path, wanted: Wanted) -> Iterator[Callable[[], Dump]]:
    name = file_name(path)
    refuse_unused(name, wanted, "key", "layers")
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(f"{name} is over {_MOST_BYTES >> 20} MiB of JSON; save the states as .npy or safetensors")
    try:
        document = parse_json(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not whole JSON ({brief(error)}); have its producer write it again") from error
    tops = list(answers_in(document))
    if tops:
        for number in chosen_prompts(len(tops), wanted, name):
            yield partial(_top, name if len(tops) == 1 else f"{name}: prompt {number}", *tops[number], wanted)
        return
    found = list(_found(document, name))
    for number in chosen_prompts(len(found), wanted, name):
        title = name if len(found) == 1 else f"{name}: prompt {number}"
        yield partial(_dump, title, found[number], wanted)


def _top(name: str, kind: str, entries: Any, beside: Mapping[str, Any], wanted: Wanted) -> Dump:
    if kind == "sglang":
        return of_input_top_logprobs(name, entries, wanted)
    return of_prompt_logprobs(name, entries, wanted, beside)


def _dump(name: str, found: _Found, wanted: Wanted) -> Dump:
    values = _matrix(found.rows, name)
    place, notes, rounded = found.place, found.notes, _decimals(values)
    if rounded is not None:
        notes = (*notes, f"precision: {rounded.removeprefix('decimals:')} decimals")
    lengths = values.norm(dim=1)
    if place is not None and len(values) > 1 and bool(((lengths - 1).abs() < _UNIT).all()):
        place, notes = (None, "final_unit"), (*notes, "every row has length 1: they were normalised")
    stored = values.float()
    return one_prompt(name, stored, wanted, place, notes=notes, rounded=rounded, positions_from=found.positions_from)


def _found(document: Any, name: str) -> Iterator[_Found]:
    """Yield the prompts of a document, by the shapes that its producers give them."""
    if isinstance(document, dict) and "hidden_states" in document.get("meta_info", {}):
        yield _of_sglang(document["meta_info"], name)
    elif isinstance(document, dict) and isinstance(document.get("data"), list):
        yield from _of_embeddings(document["data"], name)
    elif isinstance(document, dict) and "embedding" in document:
        yield from _of_embeddings([document], name)
    elif isinstance(document, dict) and isinstance(document.get("embeddings"), list):
        yield from _found(document["embeddings"], name)
    elif _depth(document) == 2:
        yield _Found(document, None, ("a list of rows, of which nothing says where they were taken",))
    elif _depth(document) == 3:
        note = "a list of prompts, of which nothing says where they were taken"
        yield from (_Found(rows, None, (note,)) for rows in document)
    elif isinstance(document, list) and document and all(isinstance(part, dict) for part in document):
        if any("embedding" in part for part in document):
            yield from _of_embeddings(document, name)
        else:
            for part in document:
                yield from _found(part, name)
    else:
        raise InputError(
            f"{name} holds no states in a layout that sipit knows: SGLang's meta_info.hidden_states, llama.cpp's "
            "embedding, or a list of rows; save the states as .npy or safetensors"
        )


def _of_sglang(meta: dict[str, Any], name: str) -> _Found:
    parts = meta["hidden_states"]
    if _depth(parts) == 1 or not isinstance(parts, list) or not parts:
        raise ShapeError(f"{name} holds the state of one token alone; ask SGLang for those of the whole prompt")
    prompt = parts[0] if _depth(parts[0]) == 2 else parts
    steps = [step[0] if _depth(step) == 2 else step for step in parts[1:]] if prompt is parts[0] else []
    notes = [
        "site final: what SGLang hands to its logits",
        f"rows {len(prompt)} of the prompt, {len(steps)} of decoding",
    ]
    count = meta.get("prompt_tokens")
    first = None
    if type(count) is int and count - len(prompt) > 0:
        first = count - len(prompt)
        notes.append(f"the first {first} of {count} prompt tokens have no row: a prefix-cache hit")
    return _Found([*prompt, *steps], (None, "final"), tuple(notes), first)


def _of_embeddings(parts: list[Any], name: str) -> Iterator[_Found]:
    held = [part.get("embedding") if isinstance(part, dict) else None for part in parts]
    depths = {_depth(each) for each in held}
    if depths == {2}:
        for rows in held:
            assert isinstance(rows, list)
            yield _Found(rows, (None, "final"), ("site final: llama.cpp's embeddings of each token",))
    elif depths == {1} and len(held) > 1:
        note = f"{len(held)} vectors taken as the tokens of one prompt; pooled ones of several prompts look the same"
        yield _Found(held, (None, "final"), (note,))
    else:
        raise ShapeError(
            f"{name} holds one vector for a whole text, pooled from its tokens; run the server with --pooling none"
        )


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and value and depth < 5:
        value, depth = value[0], depth + 1
    return depth if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _matrix(rows: list[Any], name: str) -> Tensor:
    """Return rows of numbers as (T, W), float64.

    Raises:
        ShapeError: they are not all as long.
        InputError: something else than numbers is among them.
    """
    widths = {len(row) if isinstance(row, list) else -1 for row in rows}
    if len(widths) != 1 or -1 in widths:
        raise ShapeError(f"{name} holds rows of {len(widths)} lengths, expected one; have its producer write it again")
    if not all(type(value) in (int, float) for row in rows for value in row):
        raise InputError(f"{name} holds something else than numbers among its states; have its producer write it again")
    return torch.tensor(rows, dtype=torch.float64)


def _decimals(values: Tensor) -> str | None:
    """Return with how many digits behind the point values were printed, if that is fewer than they need."""
    if torch.equal(values.bfloat16().double(), values) or torch.equal(values.half().double(), values):
        return None
    for n in _DECIMALS:
        scaled = values * 10.0**n
        if bool(((scaled - scaled.round()).abs() <= 1e-9 * scaled.abs() + 1e-6).all()):
            return f"decimals:{n}"
    return None
