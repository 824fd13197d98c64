"""A headless Chromium driven over its DevTools pipe: NUL-ended JSON on descriptors 3 and 4, no network, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_SECONDS = 60.0  # for any one answer: a busy machine may take long to start a browser


class Tab:
    """One page at one width, light or dark, with what it asked for and what it complained of."""

    def __init__(self, chromium: Chromium, *, width: int, scheme: Literal["light", "dark"]) -> None:
        self._chromium = chromium
        target = chromium.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = chromium.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the answer to a DevTools command on this page."""
        return self._chromium.call(method, session=self._session, **parameters)

    def open(self, page: Path | str) -> None:
        """Load a file, or an address, and wait until it and all that it asks for are there."""
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self._chromium.wait_for("Page.loadEventFired", self._session)

    def run(self, script: str) -> Any:
        """Return the JSON value of a JavaScript expression.

        Raises:
            RuntimeError: the expression threw.
        """
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def screenshot(self, out: Path) -> None:
        """Write the whole page as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        out.write_bytes(base64.b64decode(taken["data"]))

    def requested(self) -> list[str]:
        """Return the addresses that the page asked for, its own among them."""
        return [e["params"]["request"]["url"] for e in self._events("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """Return uncaught exceptions, and every error or warning of the console."""
        logged = [e["params"]["entry"] for e in self._events("Log.entryAdded")]
        said = [e["params"] for e in self._events("Runtime.consoleAPICalled")]
        return [
            *(str(e["params"]) for e in self._events("Runtime.exceptionThrown")),
            *(str(entry) for entry in logged if entry["level"] in ("error", "warning")),
            *(str(one) for one in said if one["type"] in ("error", "warning", "assert")),
        ]

    def _events(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # what was sent before this answer has arrived with it
        return [e for e in self._chromium.events if e["method"] == method and e.get("sessionId") == self._session]


class Chromium:
    """A browser process."""

    def __init__(self, profile: Path) -> None:
        assert EXECUTABLE is not None
        ours_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        log = str(profile.with_suffix(".log"))
        self._pid = os.posix_spawn(
            EXECUTABLE,
            [EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, ours_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
            ],
            setpgroup=0,
        )
        os.close(ours_in)
        os.close(theirs_out)
        self._received = b""
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Return the answer to a DevTools command.

        Raises:
            RuntimeError: the browser refused it.
        """
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for found in self._messages():
            if found.get("id") == self._last:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                answer: dict[str, Any] = found["result"]
                return answer
        raise AssertionError("messages never end")

    def wait_for(self, method: str, session: str) -> None:
        """Return once an event of a page has been seen."""
        if any(e["method"] == method and e.get("sessionId") == session for e in self.events):
            return
        for found in self._messages():
            if found.get("method") == method and found.get("sessionId") == session:
                return

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Yield messages as they come, and keep the events among them.

        Raises:
            TimeoutError: none came for a minute.
            ConnectionError: the browser ended.
        """
        deadline = time.monotonic() + _SECONDS
        while True:
            whole, end, rest = self._received.partition(b"\0")
            if end:
                self._received = rest
                message = json.loads(whole)
                if "method" in message:
                    self.events.append(message)
                yield message
                continue
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium has not answered for {_SECONDS:.0f} s")
            more = os.read(self._read, 1 << 20)
            if not more:
                raise ConnectionError("Chromium ended")
            self._received += more

    def close(self) -> None:
        """End the browser and its children."""
        os.close(self._write)
        os.close(self._read)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@contextmanager
def chromium(folder: Path) -> Iterator[Chromium]:
    """Run a browser with a profile of its own under a folder."""
    browser = Chromium(folder / "profile")
    try:
        yield browser
    finally:
        browser.close()
