"""Prose and code of the running interpreter's standard library."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

_LONGEST_SOURCE = 200_000  # characters; longer modules are tables
_SHORTEST_PROSE = 60  # characters
_SKIPPED = frozenset({"site-packages", "test", "idlelib", "lib2to3"})


def library_code(*, seed: int = 0, only: Collection[str] = (), without: Collection[str] = ()) -> Iterator[str]:
    """Yield the source of the standard library's modules, in an order drawn from the seed.

    Args:
        seed: of the order.
        only: top-level packages to take; empty for all.
        without: top-level packages to leave out.
    """
    for path in _sources(seed, only, without):
        source = path.read_text(encoding="utf-8", errors="ignore")
        if len(source) < _LONGEST_SOURCE:
            yield source


def library_prose(*, seed: int = 0, only: Collection[str] = (), without: Collection[str] = ()) -> Iterator[str]:
    """Yield docstrings and language topics, half of them unwrapped to flowing text; see `library_code`."""
    rng = random.Random(seed)
    pieces = [] if only else list(_topics())
    for path in _sources(seed, only, without):
        pieces += _docstrings(path)
    rng.shuffle(pieces)
    for piece in pieces:
        yield " ".join(piece.split()) if rng.random() < 0.5 else piece


def _sources(seed: int, only: Collection[str], without: Collection[str]) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        top = path.relative_to(root).parts[0].removesuffix(".py")
        if top in _SKIPPED or top in without or (only and top not in only):
            continue
        found.append(path)
    random.Random(seed).shuffle(found)
    return found


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for topic in topics.values():
        yield from (part for part in re.split(r"\n\n(?=\S)", topic) if len(part) > _SHORTEST_PROSE)


@cache  # a process that draws prose twice parses each module once; all of them together are a few megabytes
def _docstrings(path: Path) -> tuple[str, ...]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):
        return ()
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    return tuple(text for text in found if text and len(text) > _SHORTEST_PROSE)
