"""The k largest logits or log-probabilities of each row, with the token ids that they belong to.

Tensors: two of one shape, values and ids, as `torch.topk` gives them and as stores for distillation keep them. JSON:
vLLM's and OpenAI's `prompt_logprobs`, SGLang's `input_top_logprobs`, whose entry i is of the row before token i.

Source: vLLM's sequence of LogprobsLists in entrypoints/openai; SGLang's managers/tokenizer_manager.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from sipit.errors import InputError, ShapeError
from sipit.observations.formats.dump import Dump, Place, Wanted
from sipit.observations.formats.rows import ids_of, one_prompt, require_plain

LEAST = 16  # values a row, below which other tokens could have them as well
_FEW = 100  # values a row, below which the search has little to go by
_VALUES: tuple[str, ...] = (
    *("logprobs", "log_probs", "logits", "values", "top_logits", "top_logprobs", "topk_logits", "topk_logprobs"),
    *("topk_values", "top_k_logits", "top_k_logprobs", "top_k_values"),
)
_IDS: tuple[str, ...] = (
    *("token_ids", "indices", "ids", "top_ids", "top_indices", "top_token_ids", "topk_ids", "topk_indices"),
    *("topk_token_ids", "top_k_ids", "top_k_indices", "top_k_token_ids"),
)
_WHOLE = (torch.int16, torch.int32, torch.int64)


def pair_in(tensors: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return the names of values and token ids that belong together, None where there are none."""
    for key in _VALUES:
        values = tensors.get(key)
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim not in (2, 3):
            continue
        for other in _IDS:
            ids = tensors.get(other)
            if isinstance(ids, Tensor) and ids.dtype in _WHOLE and ids.shape == values.shape:
                return key, other
    return None


def of_tensors(
    name: str, values: object, token_ids: object, wanted: Wanted, input_ids: tuple[int, ...] | None = None
) -> Dump:
    """Return the dump of (T, k) values and the ids that they belong to."""
    stored, ids = require_plain(values, name), require_plain(token_ids, name)
    if stored.ndim != 2 or stored.shape != ids.shape:
        raise ShapeError(
            f"{name} holds values of shape {tuple(stored.shape)} and ids of shape {tuple(ids.shape)}, expected "
            "(tokens, k) each: one prompt"
        )
    return _dump(name, stored, ids.long(), wanted=wanted, notes=(), known=input_ids)


def of_prompt_logprobs(name: str, entries: object, wanted: Wanted, beside: Mapping[str, Any]) -> Dump:
    """Return the dump of a list with, for each prompt token but the first, {token id: log-probability} before it."""
    if not isinstance(entries, list):
        raise _unreadable(name, "prompt_logprobs")
    rows = [_pairs_of_vllm(entry, name) for entry in entries if entry is not None]
    listed = beside.get("prompt_token_ids")
    known = None if listed is None else ids_of(listed, f"{name}: prompt_token_ids")
    return _of_rows(name, rows, wanted, "vLLM's prompt_logprobs", known)


def of_input_top_logprobs(name: str, meta: Mapping[str, Any], wanted: Wanted) -> Dump:
    """Return the dump of SGLang's [log-probability, token id, text] lists, one for each prompt token but the first."""
    entries = meta["input_top_logprobs"]
    if not isinstance(entries, list):
        raise _unreadable(name, "input_top_logprobs")
    rows = [_pairs_of_sglang(entry, name) for entry in entries if entry]
    own = meta.get("input_token_logprobs")
    known = None
    if isinstance(own, list) and all(isinstance(each, list) and len(each) > 1 for each in own):
        known = ids_of([each[1] for each in own], f"{name}: input_token_logprobs")
    return _of_rows(name, rows, wanted, "SGLang's input_top_logprobs", known)


def _pairs_of_vllm(entry: object, name: str) -> list[tuple[int, float]]:
    if not isinstance(entry, dict):
        raise _unreadable(name, "prompt_logprobs")
    pairs = []
    for key, stored in entry.items():
        value = stored.get("logprob") if isinstance(stored, dict) else stored
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 and _is_number(value)):
            raise _unreadable(name, "prompt_logprobs")
        pairs.append((int(key), float(cast(float, value))))
    return pairs


def _pairs_of_sglang(entry: object, name: str) -> list[tuple[int, float]]:
    if not isinstance(entry, list) or not all(isinstance(each, list) and len(each) > 1 for each in entry):
        raise _unreadable(name, "input_top_logprobs")
    if not all(type(each[1]) is int and 0 <= each[1] < 1 << 31 and _is_number(each[0]) for each in entry):
        raise _unreadable(name, "input_top_logprobs")
    return [(each[1], float(each[0])) for each in entry]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _unreadable(name: str, what: str) -> InputError:
    return InputError(f"{name}: its {what} are no log-probabilities by token id; have its producer write it again")


def _of_rows(
    name: str, rows: list[list[tuple[int, float]]], wanted: Wanted, what: str, known: tuple[int, ...] | None
) -> Dump:
    if not rows or not all(rows):
        raise ShapeError(f"{name} holds a row without log-probabilities; ask for some of every prompt token")
    width = max(map(len, rows))
    values, ids = torch.full((len(rows), width), -torch.inf), torch.full((len(rows), width), -1)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor([i for i, _ in row])
        values[number, : len(row)] = torch.tensor([value for _, value in row])
    notes = [f"site log_probs: {what}, entry i read as the row of the token before it; the last token has no row"]
    if known is not None:
        notes.append("token ids: they lie in the file in clear")
        known = known[: len(rows)] if len(known) > len(rows) else None
    return _dump(
        name, values, ids, wanted=replace(wanted, site=wanted.site or "log_probs"), notes=tuple(notes), known=known
    )


def _dump(
    name: str, values: Tensor, ids: Tensor, *, wanted: Wanted, notes: tuple[str, ...], known: tuple[int, ...] | None
) -> Dump:
    is_there = (ids >= 0) & values.isfinite()
    counts = is_there.sum(dim=1)
    if not len(counts) or int(counts.min()) < LEAST:
        raise InputError(
            f"{name} holds {int(counts.min()) if len(counts) else 0} values of a row, too few to tell tokens apart; "
            f"store {LEAST} or more, better {_FEW}"
        )
    ordered = ids.masked_fill(~is_there, -1).sort(dim=1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise InputError(f"{name} names a token id twice in a row; have its producer write it again")
    lowest = values.float().masked_fill(~is_there, torch.inf).min(dim=1, keepdim=True).values
    values = torch.where(is_there, values, lowest.to(values.dtype))
    sums = values.double().masked_fill(~is_there, -torch.inf).logsumexp(dim=1)
    site = wanted.site or ("log_probs" if bool((sums < 1e-3).all()) else "logits")
    few = f" (fewer than {_FEW}: the search takes long)" if int(counts.min()) < _FEW else ""
    place: Place = (None, site)
    return one_prompt(
        name,
        values.contiguous(),
        wanted,
        place,
        columns=ids.masked_fill(~is_there, -1),
        input_ids=known,
        notes=(*notes, f"the {int(counts.min())} largest {site} of each row{few}"),
    )


def answers_in(document: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the log-probabilities of each prompt in a JSON answer: which kind, the entries, and what lies beside."""
    if isinstance(document, list):
        for part in document:
            yield from answers_in(part)
    if not isinstance(document, dict):
        return
    meta = document.get("meta_info")
    if isinstance(meta, dict) and meta.get("input_top_logprobs"):
        yield "sglang", meta, {}
    if document.get("prompt_logprobs"):
        yield "vllm", document["prompt_logprobs"], document
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        yield from answers_in({"prompt_token_ids": document.get("prompt_token_ids"), **choice})
