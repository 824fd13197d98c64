"""Carries the notebooks of examples/ into the site, where the pages link them by the path that they have here."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_EXAMPLES = Path(__file__).parent / "examples"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks."""
    for path in sorted(_EXAMPLES.glob("*.ipynb")):
        files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    return files
