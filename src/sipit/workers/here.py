"""The pieces of a job, one after the other in this process, and what anything that does them elsewhere must answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from sipit.models import LanguageModel

Piece = TypeVar("Piece")
Result = TypeVar("Result")
Work = Callable[[LanguageModel, Piece], Result]  # a function of a module, so that another process can find it


class Workers(Protocol):
    """Does pieces of a job, each by itself and with the same model."""

    def results(self, work: Work[Any, Result], pieces: Iterable[Any]) -> Iterator[Result]:
        """Yield what comes of each piece, in the order of the pieces, which are drawn as there is someone to do them.

        An exception that a piece raises is raised in its turn, after the results of those before it.
        """


class Here:
    """This process, which has the model already."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    def results(self, work: Work[Any, Result], pieces: Iterable[Any]) -> Iterator[Result]:
        for piece in pieces:
            yield work(self._lm, piece)
