"""Seeded damage to the bytes of a file: blind, to a safetensors header, to a JSON text."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Damaged = tuple[str, bytes]  # what was done, for a person; the bytes


def damaged_bytes(rng: random.Random, raw: bytes) -> Damaged:
    """Damage bytes without regard to what they mean."""
    bad = bytearray(raw)
    kind = rng.randrange(8)
    place = rng.randrange(len(raw))
    if kind == 0:
        return "nothing left", b""
    if kind == 1:
        return f"cut off at byte {place}", raw[:place]
    if kind == 2:
        return "bytes behind its end", raw + rng.randbytes(rng.choice((1, 8, 1000)))
    if kind == 3:
        return "random bytes", rng.randbytes(rng.choice((1, 7, 8, 9, 500)))
    if kind == 4:
        bad[place : place + 50] = bytes(50)
        return f"zeros at byte {place}", bytes(bad)
    places = [rng.randrange(len(raw) if kind == 5 else min(len(raw), 300)) for _ in range(rng.choice((1, 1, 3)))]
    for place in places:
        bad[place] ^= 1 << rng.randrange(8)
    return f"bits flipped at {places}", bytes(bad)


def damaged_header(rng: random.Random, raw: bytes) -> Damaged:
    """Damage the header of a safetensors file so that its length stays right, or the length alone."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if rng.randrange(8) == 0:
        told = rng.choice((0, 1, length - 1, length + 1, 2**63, 2**64 - 1, 99_999_999, 100_000_001))
        return f"a header of {told} bytes", struct.pack("<Q", told) + raw[8:]
    about = header.setdefault("__metadata__", {})
    tensor = rng.choice([key for key in header if key != "__metadata__"])
    key = rng.choice(list(about) or ["note"])
    odd = ["", "-1", "1e3", "２", "9" * 5000, "true", "null", "[" * 100_000, "[0, NaN]", "[1.0]", "\ud800", "x" * 10**6]
    edits: list[tuple[str, Callable[[], Any]]] = [
        ("without metadata", lambda: header.pop("__metadata__")),
        (f"without {key}", lambda: about.pop(key, None)),
        *[(f"{key} = {value[:20]!r}", lambda value=value: about.update({key: value})) for value in odd],
        (f"{key} a number", lambda: about.update({key: 3})),
        (f"{key} an object", lambda: about.update({key: {"a": []}})),
        ("one key more", lambda: about.update({"note" * rng.choice((1, 10_000)): "x"})),
        ("a tensor of another name", lambda: header.update({"\u202e" * 3 + "x" * 5000: header.pop(tensor)})),
        ("the model is text of 5,000", lambda: about.update(model="m" * 5000)),
        ("a model with a line break", lambda: about.update(model="a\nb\x1b[2J", fingerprint="sha256:0")),
        ("many tensors", lambda: header.update({f"t{i}": header[tensor] for i in range(500)})),
    ]
    fields: dict[str, list[Any]] = {
        "dtype": ["I32", "BOOL", "F8_E4M3", "F64", "BF16", "nonsense", 3, None],
        "shape": [[], [0], [0, 32], [4, -32], [2**63, 2**63], [2**32, 2**32], "4", [1.5, 2]],
        "data_offsets": [[0, 0], [0, 1], [8, 4], [0, 2**63], [2**62, 2**63], [-1, 5], []],
    }
    for field, values in fields.items():
        value = rng.choice(values)
        edits += [(f"{field} {value}", lambda f=field, v=value: header[tensor].update({f: v}))] * 4  # type: ignore[misc]
    what, edit = rng.choice(edits)
    edit()
    text = json.dumps(header).encode()
    return what, struct.pack("<Q", len(text)) + text + body


def damaged_json(rng: random.Random, raw: bytes) -> Damaged:
    """Damage a JSON text: a value somewhere inside, or the text itself."""
    record = json.loads(raw)
    text = raw.decode()
    whole: list[tuple[str, bytes]] = [
        ("a list", b"[]"),
        ("null", b"null"),
        ("a number", b"3"),
        ("a text", b'"x"'),
        ("an empty object", b"{}"),
        ("brackets 100,000 deep", b"[" * 100_000),
        ("objects 100,000 deep", b'{"a":' * 100_000),
        ("a byte order mark", b"\xef\xbb\xbf" + raw),
        ("UTF-16", text.encode("utf-16")),
        ("a byte that is not UTF-8", raw[:-3] + b"\xff" + raw[-3:]),
        ("a key named twice", text.replace("{", '{"format": "sipit.certificate", ', 1).encode()),
        ("twice", raw + raw),
    ]
    if rng.randrange(4) == 0:
        return rng.choice(whole)
    holder, key = _somewhere(rng, record)
    if rng.randrange(5) == 0:
        del holder[key]
        return f"without {key!r}", json.dumps(record).encode()
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        1e300,
        10**400,
        2**63,
        1.5,
        "",
        "\ud800",
        "x" * 10**6,
        [],
        {},
        [[[]]],
        {"a": 1},
    ]
    odd += [float("nan"), float("inf"), -float("inf"), "\x1b[2J\n", "../../../etc/passwd", [None] * 1000]
    value = rng.choice(odd)
    holder[key] = value
    return f"{key!r} = {str(value)[:30]!r}", json.dumps(record).encode()


def _somewhere(rng: random.Random, record: Any) -> tuple[Any, Any]:
    """Return a list or object inside a record, and a key of it."""
    holder, key = record, rng.randrange(len(record)) if isinstance(record, list) else rng.choice(list(record))
    while isinstance(holder[key], dict | list) and holder[key] and rng.randrange(3):
        holder = holder[key]
        key = rng.randrange(len(holder)) if isinstance(holder, list) else rng.choice(list(holder))
    return holder, key
