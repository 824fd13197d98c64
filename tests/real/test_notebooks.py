"""The notebooks in examples/ run, and print what is stored in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]
_NOTEBOOKS = sorted((_ROOT / "examples").glob("*.ipynb"))
pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]


def _cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def test_there_are_the_two_that_the_docs_name() -> None:
    named = (_ROOT / "docs" / "for" / "researcher.md").read_text("utf-8")
    assert [path.name for path in _NOTEBOOKS] == ["first_inversion.ipynb", "separability.ipynb"]
    assert all(f"examples/{path.name}" in named for path in _NOTEBOOKS)


@pytest.mark.thorough
@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_each_cell_prints_what_is_stored(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for number, cell in enumerate(_cells(path, "code")):
        exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), names)
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        assert capsys.readouterr().out == stored
