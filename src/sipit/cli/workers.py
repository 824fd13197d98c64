"""The option --ray: where the pieces of a large job are done."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sipit.models import LanguageModel
    from sipit.workers import Workers

_ADDRESS = re.compile(r"auto|local|[\w.\-\[\]:]+:\d+", re.ASCII)


def ray_option(command: ArgumentParser) -> None:
    """Add --ray to a command."""
    command.add_argument(
        "--ray",
        nargs="?",
        const="local",
        type=_address,
        metavar="ADDRESS",
        help="let Ray's workers do it (extra 'ray'): those of a cluster, or by default of this machine",
    )


def _address(text: str) -> str:
    if _ADDRESS.fullmatch(text) is None:
        raise ArgumentTypeError(
            f"takes the address of a cluster, HOST:PORT or 'auto', got {text!r}; name files before it"
        )
    return text


@contextmanager
def workers_of(
    address: str | None, lm: LanguageModel, *, model: str, device: str, dtype: str, quantize: str | None = None
) -> Iterator[Workers]:
    """Open the workers that --ray names, each with the model as it was loaded here; without it, this process."""
    from sipit.models import load
    from sipit.workers import Here, OnRay

    if address is None:
        yield Here(lm)
        return
    name = str(Path(model).resolve()) if Path(model).exists() else model  # a worker may run in another folder
    loader = partial(load, name, device=device, dtype=dtype, quantize=quantize)
    with OnRay(loader, address) as workers:
        yield workers
