"""Copies of a module of checks, each with one of its checks left out.

A check is a statement that gives a reason against a claim: it appends or adds to `reasons` or `found`, yields the key
that is wrong, raises, or returns a list that holds a reason.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest.mock import patch


def without_each_check(module: ModuleType) -> Iterator[tuple[str, ModuleType]]:
    """Yield each check's own source, and the module without it."""
    source = inspect.getsource(module)
    for number in range(len(_checks(ast.parse(source)))):
        tree = ast.parse(source)
        body, place = _checks(tree)[number]
        check = body[place]
        left_out = "return []" if isinstance(check, ast.Return) else "pass"
        body[place] = ast.copy_location(ast.parse(f"def f():\n {left_out}").body[0].body[0], check)  # type: ignore[attr-defined]
        copy = ModuleType(module.__name__)
        copy.__package__ = module.__package__
        with patch.dict(sys.modules, {module.__name__: copy}):  # dataclasses look their module up
            exec(compile(ast.fix_missing_locations(tree), module.__file__ or "", "exec"), copy.__dict__)  # noqa: S102
        yield ast.unparse(check), copy


def _checks(tree: ast.Module) -> list[tuple[list[ast.stmt], int]]:
    """Return where the checks of a module stand: a list of statements, and the place in it."""
    bodies = [getattr(node, field, None) for node in ast.walk(tree) for field in ("body", "orelse")]
    return [
        (body, place)
        for body in bodies
        if isinstance(body, list)
        for place, statement in enumerate(body)
        if _is_check(statement)
    ]


def _is_check(statement: ast.stmt) -> bool:
    match statement:
        case ast.Raise() | ast.Expr(value=ast.Yield() | ast.YieldFrom()):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="reasons" | "found"), attr="append"))):
            return True
        case ast.AugAssign(target=ast.Name(id="reasons")) | ast.Return(value=ast.List(elts=[_])):
            return True
    return False
