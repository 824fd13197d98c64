"""The page of `sipit demo --web` in a real browser: text in, tokens out, its certificate, two visitors at once."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest

import sipit
from sipit import LanguageModel
from sipit.inversion import check_certificate
from tests.browser.chromium import EXECUTABLE, Chromium, Tab, chromium

pytest.importorskip("gradio")
pytestmark = [
    pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed (Debian's package: chromium)"),
    pytest.mark.thorough,
    pytest.mark.xdist_group("browser"),
]
_SECONDS = 60.0
# A test run that was started in the background hands on an ignored SIGINT, which no terminal would.
_RUN = (
    "import signal, sys, sipit.cli; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "sys.exit(sipit.cli.main(sys.argv[1:]))"
)
_FILL = """(() => {const field = document.querySelector('#text textarea');
Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(field, %s);
field.dispatchEvent(new Event('input', {bubbles: true}))})()"""
_DROP = """(() => {const bytes = Uint8Array.from(atob(%s), one => one.charCodeAt(0)), held = new DataTransfer();
held.items.add(new File([bytes], 'seen.safetensors'));
const input = document.querySelector('#file input[type=file]'); input.files = held.files;
input.dispatchEvent(new Event('change', {bubbles: true}))})()"""
_STATUS = "document.querySelector('#status')?.innerText ?? ''"


@pytest.fixture(scope="module")
def lm(text_folder: Path) -> LanguageModel:
    return sipit.load(text_folder)


@pytest.fixture(scope="module")
def address(text_folder: Path) -> Iterator[str]:
    command = [sys.executable, "-c", _RUN, "demo", "--web", "--model", str(text_folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        yield next(line.split()[0] for line in lines if line.startswith("http://127.0.0.1:"))
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert (process.wait(timeout=60), rest.splitlines()[-1]) == (0, "stopped")
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def _opened(browser: Chromium, address: str, *, scheme: str = "light") -> Tab:
    tab = Tab(browser, width=1200, scheme=scheme)  # type: ignore[arg-type]
    tab.open(address)
    _until(tab, "['#recover', '#text textarea'].every(each => document.querySelector(each) !== null)")
    return tab


def _until(tab: Tab, expression: str) -> None:
    end = time.monotonic() + _SECONDS
    while not tab.run(expression):
        assert time.monotonic() < end, (expression, tab.run("document.body.innerText"))
        time.sleep(0.1)


def _asked(tab: Tab, text: str) -> None:
    tab.run(_FILL % json.dumps(text))
    tab.run("document.querySelector('#recover').click()")


def _recovered(tab: Tab) -> str:
    _until(tab, f"/^(recovered|ambiguous|unmatched|refused)/.test({_STATUS})")
    return str(tab.run("document.querySelector('#tokens .recovered')?.innerText"))


def test_a_text_comes_back_token_by_token_with_its_certificate(
    browser: Chromium, address: str, lm: LanguageModel, tmp_path: Path
) -> None:
    tab = _opened(browser, address)
    _asked(tab, "<b>my secret</b>")
    assert _recovered(tab) == "<b>my secret</b>"
    assert tab.run(_STATUS).startswith("recovered")
    rows = tab.run("[...document.querySelectorAll('.evidence tbody tr')].map(e => e.innerText.split('\\t'))")
    assert [row[1] for row in rows[-3:]] == ["/", "b", ">"]
    assert all(float(row[2]) <= float(row[3]) for row in rows)
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    certificate_link = "document.querySelector('#certificate button, #certificate a')"
    _until(tab, f"{certificate_link} !== null")  # it may come a moment after the verdict
    tab.run(f"{certificate_link}.click()")
    end = time.monotonic() + _SECONDS
    while not (held := list(tmp_path.glob("*.json"))):
        assert time.monotonic() < end, list(tmp_path.iterdir())
        time.sleep(0.1)
    certificate = json.loads(held[0].read_text("utf-8"))
    assert certificate["text"] == "<b>my secret</b>"
    seen = lm.capture("<b>my secret</b>", layer=certificate["layer"])
    assert check_certificate(certificate, seen, lm).holds
    assert {urlparse(one).hostname for one in tab.requested() if not one.startswith(("data:", "blob:", "about:"))} == {
        "127.0.0.1"
    }


def test_two_visitors_are_served_at_once_and_see_their_own(browser: Chromium, address: str) -> None:
    one, other = _opened(browser, address), _opened(browser, address, scheme="dark")
    _asked(one, "the first of two")
    _asked(other, "and the second")
    assert (_recovered(one), _recovered(other)) == ("the first of two", "and the second")


def test_a_dropped_file_is_inverted_at_the_place_it_names(
    browser: Chromium, address: str, lm: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "seen.safetensors"
    sipit.write_observation(lm.capture("from a file", site="final"), path)
    tab = _opened(browser, address)
    tab.run(_DROP % json.dumps(base64.b64encode(path.read_bytes()).decode()))
    _until(tab, "document.querySelector('#file').innerText.includes('seen')")
    tab.run("document.querySelector('#recover').click()")
    assert _recovered(tab) == "from a file"


def test_nothing_to_do_is_said_in_a_sentence(browser: Chromium, address: str) -> None:
    tab = _opened(browser, address)
    tab.run("document.querySelector('#recover').click()")
    _until(tab, f"{_STATUS}.startsWith('refused: there is no text; write one')")
