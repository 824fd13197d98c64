"""What a waiting user sees on standard error: live on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sipit.cli.messages import say

if TYPE_CHECKING:
    from sipit.inversion import LastProgress, OnProgress, Progress
    from sipit.inversion.fitting import FitProgress
    from sipit.models import LanguageModel

_LINE_SECONDS = 5.0  # between progress lines where there is no terminal
_SHOWN_TOKENS = 400  # at the end of the recovered text


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show a spinner on a terminal while the body runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield


_AnyDisplay = TypeVar("_AnyDisplay", bound="_Display")


class _Display:
    """A line that changes in its place on a terminal; a line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._began = self._last_line = time.monotonic()

    def __enter__(self: _AnyDisplay) -> _AnyDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the display off the terminal."""
        self._live.stop()

    def _show(self, line: str, text: str | None = None) -> None:
        """Show a line, under a text that is shown on terminals alone."""
        if self._console.is_terminal:
            self._live.update(Text("" if text is None else f"{text}\n", style="bold") + Text(line, style="dim"))
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            say(line)


class SearchDisplay(_Display):
    """Tokens done, candidates tried, time left and the text so far, while a search runs."""

    def __init__(self, lm: LanguageModel, seq_len: int) -> None:
        super().__init__()
        self._lm = lm
        self._seq_len = seq_len
        self.input_ids: tuple[int, ...] = ()

    def update(self, progress: Progress) -> None:
        """Show where the search stands; an `on_progress` callback."""
        self.input_ids = progress.input_ids
        if len(progress.input_ids) < self._seq_len or self._console.is_terminal:
            self._show(_line(progress), self._lm.decode(progress.input_ids[-_SHOWN_TOKENS:]) or "")

    def also(self, other: OnProgress) -> OnProgress:
        """Return a callback that calls another one too."""

        def both(progress: Progress) -> None:
            self.update(progress)
            other(progress)

        return both


class LastDisplay(_Display):
    """Prompts tried, the nearest and the time left, while a whole prompt is sought."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self._lm = lm
        self.line = ""

    def update(self, progress: LastProgress) -> None:
        """Show where the search stands; the `on_progress` of `invert_last`."""
        text = self._lm.decode(progress.nearest)
        shown = ",".join(map(str, progress.nearest)) if text is None else repr(text)
        self.line = (
            f"{progress.n_tried:,} prompts tried, {progress.seconds:.0f} of {progress.budget:.0f} s at most, "
            f"the nearest {progress.distance:.3g} away: {shown}"
        )
        self._show(self.line)


class CountDisplay(_Display):
    """How many of several pieces of work are done, and the time left; or where a fit stands."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total = total
        self._done = self._tokens = 0

    def step(self, n_tokens: int) -> None:
        """Count one piece of work."""
        self._done += 1
        self._tokens += n_tokens
        seconds = time.monotonic() - self._began
        left = _left(seconds, self._done, self._total)
        self._show(f"{self._done}/{self._total} done, {self._tokens} tokens, {seconds:.0f} s{left}")

    def fitting(self, progress: FitProgress) -> None:
        """Show where a fit stands; an `on_progress` callback."""
        share = 100 * progress.done / max(progress.total, 1)
        self._show(f"{progress.phase}: {share:.0f} %{_left(progress.seconds, progress.done, progress.total)}")

    def phase(self, what: str) -> Callable[[int, int], None]:
        """Return a callback that shows how much of one phase is done, from now on, and the time left."""
        began, first = time.monotonic(), -1

        def tell(done: int, total: int) -> None:
            nonlocal first
            first = done if first < 0 else first  # what an earlier run left is done at once
            seconds = time.monotonic() - began
            left = f", about {seconds / (done - first) * (total - done):.0f} s left" if done > first else ""
            self._show(f"{what}: {done:,} of {total:,}{left}")

        return tell


def _line(progress: Progress) -> str:
    done = len(progress.input_ids)
    return (
        f"{done}/{progress.seq_len} tokens, {progress.n_checked} candidates tried, "
        f"{progress.seconds:.0f} s{_left(progress.seconds, done, progress.seq_len)}"
    )


def _left(seconds: float, done: int, total: int) -> str:
    """Return the time left, or nothing while nothing is done and any number would be made up."""
    return f", about {seconds / done * (total - done):.0f} s left" if done > 0 else ""
