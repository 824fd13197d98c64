"""Lines for the user, on standard error beside the results."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from sipit.errors import SipitError

if TYPE_CHECKING:
    from sipit.inversion import Inversion


def printable(text: str) -> str:
    """Return a text in which a file's names cannot move the cursor: what does not print stands as its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(line: str) -> None:
    """Write a line for the user."""
    print(printable(line), file=sys.stderr)


def refuse(name: str, error: SipitError) -> None:
    """Report an entry that is passed over, with the reason."""
    say(f"sipit: {name}: {error}")
    print(json.dumps({"file": name, "refused": str(error)}, ensure_ascii=False))


def say_verdict(found: Inversion) -> None:
    """Write the verdict of an inversion with its evidence, and what it cost."""
    say(f"verdict   {found.summary()}")
    say(
        f"cost      {found.seconds:.1f} s, {found.wall_ratio:.1f} times a plain forward pass through the same blocks; "
        f"{found.n_checked} candidates in {found.n_passes} passes, {found.prefill_ratio:.2f} times its tokens"
    )
