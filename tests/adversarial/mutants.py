"""The replay of certificates with one of its checks left out at a time: do the forgeries notice?

A check is a statement that gives a reason against a claim: it appends or adds to `reasons` or `found`, returns a list
that holds a reason, yields the key that is wrong, or raises. `python -m tests.adversarial.mutants 4` leaves out each of
them, with so many forgeries of each kind and an odd value at each key, and prints those that nothing noticed; the suite
does it for the reasons alone, with fewer.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from unittest.mock import patch

from sipit.errors import SipitError
from sipit.inversion import check_certificate
from sipit.inversion.evidence import certificate
from sipit.inversion.judging import noise_model, replay, residuals
from tests.adversarial.forgeries import KINDS, Check, Forgery, judged, made, odd_values

_SEAMS = {replay: "replay", residuals: "residuals_of", noise_model: "noise_model"}  # by which a certificate calls them
_OF_FILES = "is not JSON"  # a check of what a file holds: see tests.adversarial.malformed


def unnoticed_checks(n_each: int, *, reasons_only: bool = False) -> list[str]:
    """Return the checks without which every forgery ends as it does with them.

    Args:
        n_each: forgeries of each kind.
        reasons_only: leave out no check of the values' types, and forge no odd values.
    """
    forgeries = [made(number, kind) for kind in KINDS for number in range(n_each)]
    if not reasons_only:
        for honest in (_first_with_rivals(), made(0, "a posterior")):
            odd = odd_values(honest.true)
            forgeries += [replace(honest, record=record, seen=honest.true_seen, what=how) for how, record in odd]
    unnoticed = []
    with patch.object(replay, "_REMEASURED", 1):  # the noise of single states turns no forgery down, and takes long
        said = [(forged, _said(forged)) for forged in forgeries]
        for module in (certificate, *_SEAMS):
            for check, without in without_each_check(module, reasons_only=reasons_only):
                words = _longest_words(check)
                likely = sorted(said, key=lambda each: words not in each[1])  # first those that this check turned down
                if _OF_FILES not in ast.unparse(check) and not _is_noticed(
                    module, without, [forged for forged, _ in likely]
                ):
                    unnoticed.append(ast.unparse(check))
    return unnoticed


def _first_with_rivals() -> Forgery:
    """Return an honest record whose first position names a rival."""
    honest = (made(number, "nothing") for number in itertools.count())
    return next(one for one in honest if one.true["positions"][0]["rivals"])


def without_each_check(module: ModuleType, *, reasons_only: bool = False) -> Iterator[tuple[ast.stmt, ModuleType]]:
    """Yield each check of a module, and a copy of the module without it."""
    source = inspect.getsource(module)
    for number in range(len(_checks(ast.parse(source), reasons_only))):
        tree = ast.parse(source)
        body, place = _checks(tree, reasons_only)[number]
        check = body[place]
        body[place] = ast.Return(ast.List([], ast.Load())) if isinstance(check, ast.Return) else ast.Pass()
        ast.fix_missing_locations(ast.copy_location(body[place], check))
        without = ModuleType(module.__name__)
        with patch.dict(sys.modules, {module.__name__: without}):  # dataclasses look their module up
            exec(compile(tree, str(module.__file__), "exec"), without.__dict__)
        yield check, without


def _checks(tree: ast.Module, reasons_only: bool) -> list[tuple[list[ast.stmt], int]]:
    """Return where the checks of a module stand: a list of statements, and the place in it."""
    bodies = [getattr(node, field, None) for node in ast.walk(tree) for field in ("body", "orelse")]
    return [
        (body, place)
        for body in bodies
        if isinstance(body, list)
        for place, statement in enumerate(body)
        if _is_reason(statement) or (not reasons_only and _is_refusal(statement))
    ]


def _is_reason(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="reasons" | "found"), attr="append"))):
            return True
        case ast.AugAssign(target=ast.Name(id="reasons")) | ast.Return(value=ast.List(elts=[_])):
            return True
    return False


def _is_refusal(statement: ast.stmt) -> bool:
    match statement:
        case ast.Raise() | ast.Expr(value=ast.Yield() | ast.YieldFrom()):
            return True
    return False


def _longest_words(check: ast.stmt) -> str:
    """Return the longest text that stands in a check."""
    texts = [node.value for node in ast.walk(check) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return max(texts, key=len, default="")


def _said(forged: Forgery) -> str:
    """Return what a replay gives against a forgery."""
    try:
        return "; ".join(check_certificate(forged.record, forged.seen, forged.lm).reasons)
    except SipitError as error:
        return str(error)


def _is_noticed(module: ModuleType, without: ModuleType, forgeries: Sequence[Forgery]) -> bool:
    if module is certificate:
        return _any_fault(without.check_certificate, forgeries)
    with patch.object(certificate, _SEAMS[module], getattr(without, _SEAMS[module])):
        return _any_fault(check_certificate, forgeries)


def _any_fault(check: Check, forgeries: Sequence[Forgery]) -> bool:
    return any(judged(0, forged, check).fault is not None for forged in forgeries)


def main() -> int:
    """Leave out every check from the command line: how many forgeries of each kind there are (default 4)."""
    warnings.simplefilter("ignore")
    unnoticed = unnoticed_checks(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
    print(*unnoticed, f"{len(unnoticed)} checks can be left out unnoticed", sep="\n")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    raise SystemExit(main())
