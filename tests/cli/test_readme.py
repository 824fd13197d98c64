"""The README's promises: its Python runs, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sipit.cli import main
from sipit.cli.arguments import parser

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.thorough
@pytest.mark.real
def test_python_examples_recover_a_prompt_and_find_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    for example in re.findall(r"```python\n(.*?)```", _README, flags=re.DOTALL):
        exec(compile(example, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("recovered A prompt. (")
    assert second.startswith("[NearPair(first=")


def test_every_command_it_shows_parses() -> None:
    commands = set(re.findall(r"`sipit (\w+)", _README))
    assert {"demo", "capture", "invert", "check", "fit", "bench", "collisions", "audit", "reproduce"} <= commands
    help_text = parser().format_help()
    assert all(re.search(rf"^    {command}\b", help_text, flags=re.MULTILINE) for command in commands)


def test_every_option_it_shows_is_one_of_that_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"`sipit ([^`]+)`", _README)
    assert len(shown) > 15
    for line in shown:
        words = line.split()
        command = words[: 2 if words[0] == "collisions" else 1]
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known = capsys.readouterr().out
        assert [option for option in re.findall(r"--[a-z-]+", line) if f"{option} " not in known] == []


def test_it_fits_a_sitting() -> None:
    assert len(_README.splitlines()) <= 150


def test_every_file_it_links_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", _README)
    assert links
    files, headings = zip(*(link.partition("#")[::2] for link in links), strict=True)
    assert [name for name in files if not (_ROOT / name).exists()] == []
    for name, heading in zip(files, headings, strict=True):
        titles = re.findall(r"^#+ (.*)$", (_ROOT / name).read_text("utf-8"), flags=re.MULTILINE) if heading else []
        assert not heading or heading in [title.lower().replace(" ", "-") for title in titles]


def test_no_placeholder_is_left() -> None:
    assert "{{" not in _README
    assert "@@" not in _README
