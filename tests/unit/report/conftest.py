"""What the tests of figures share."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved in a test."""
    found: list[Figure] = []
    real = Figure.savefig

    def kept(self: Figure, *arguments: Any, **options: Any) -> None:
        found.append(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return found
