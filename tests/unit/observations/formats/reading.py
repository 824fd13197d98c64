"""What every test of a reader needs: all that a path yields, and what may be said of any file."""

from __future__ import annotations

from pathlib import Path

from sipit.errors import SipitError
from sipit.observations.formats import Dump, Wanted, read_dumps

LONGEST = 300  # characters of an error message


def all_of(path: Path, **wanted: object) -> list[Dump | SipitError]:
    """Everything a path yields; each error is one that a person can read."""
    items = list(read_dumps(path, Wanted(**wanted)))  # type: ignore[arg-type]
    for item in items:
        if isinstance(item, SipitError):
            text = str(item)
            assert len(text) < LONGEST, text
            assert "\n" not in text
            assert text.isprintable()
    return items


def dumps_of(path: Path, **wanted: object) -> list[Dump]:
    """The dumps of a path that yields no error."""
    items = all_of(path, **wanted)
    assert not [item for item in items if isinstance(item, SipitError)]
    return [item for item in items if isinstance(item, Dump)]


def dump_of(path: Path, **wanted: object) -> Dump:
    """The one dump of a path."""
    (dump,) = dumps_of(path, **wanted)
    return dump


def error_of(path: Path, **wanted: object) -> SipitError:
    """The one error of a path that yields nothing else."""
    (error,) = all_of(path, **wanted)
    assert isinstance(error, SipitError)
    return error
