"""What a file of another tool holds: the leaked values of one prompt at one place, as found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from sipit.errors import InputError, SipitError, StorageError

Place = tuple[int | None, str]  # (layer, site); layer None where it is not known

# What libraries and our own indexing raise on bytes that are not what they claim to be.
_FAULTS = (
    SafetensorError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    AttributeError,
    MemoryError,
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a model decides how values are laid out."""

    n_layers: int
    d_head: int | None = None  # width of a key
    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user said of a file; None where nothing was said."""

    layer: int | None = None  # blocks run
    site: str | None = None
    key: str | None = None  # of the tensor in a file of several
    prompt: int | None = None  # 0-based, of a batch or a file of several
    layers: tuple[int, ...] | None = None  # blocks run, of the columns or stacked slices joined in the file
    dtype: str | None = None  # of raw arrays that lost their type


@dataclass(frozen=True, kw_only=True, eq=False)
class Dump:
    """The leaked values of one prompt at one place, as found in a file."""

    name: str  # what messages call it: "FILE", "FILE: prompt 2", "FILE: blocks.3.hook_resid_pre"
    values: Tensor  # (T, W) floats in the dtype they had; float8 multiplied by its scales, as float32
    layer: int | None = None  # blocks run; None where the file does not say
    site: str | None = None  # block, final, kv (keys then values), keys, values or logits; None where not said
    choices: tuple[Place, ...] = ()  # where versions of the producer differ: each place it may be
    input_ids: tuple[int, ...] | None = field(default=None, repr=False)  # the truth to score against, found beside
    positions_from: int | None = None  # first position held, where the file tells
    scales: Tensor | None = None  # (T,) scale of each row of quantised values
    rounded: str | None = None  # precision the values once had, where the file says: "bfloat16", "decimals:7"
    is_interleaved: bool = False  # keys whose heads hold each rotary pair side by side, transformers' hold halves
    columns: Tensor | None = None  # (T, W) coordinate of each value where a row holds some only; -1: none
    notes: tuple[str, ...] = ()  # what was decided, one short line each

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values.detach())  # as in `Observation`


class EachInTurn(Iterator[Dump]):
    """Dumps made one at a time: one that cannot be made raises for itself, and the next call goes on.

    Raises:
        InputError: on whatever a broken file makes a library raise, besides the reader's own sentences.
        StorageError: the file cannot be read.
    """

    def __init__(self, path: Path, makers: Iterable[Callable[[], Dump]]) -> None:
        self._path = path
        self._makers = iter(makers)

    def __next__(self) -> Dump:
        try:
            return next(self._makers)()
        except (SipitError, StopIteration):
            raise
        except OSError as error:
            raise StorageError(f"cannot read {file_name(self._path)}: {brief(error)}; check its permissions") from error
        except _FAULTS as error:
            raise InputError(
                f"{file_name(self._path)} is not what its first bytes promise ({brief(error)}); "
                "copy it again or have its producer write it again"
            ) from error


def file_name(path: Path) -> str:
    """Return a file's name as messages show it: printable, its middle left out where it is long."""
    name = path.name or str(path)
    return shortened(name)


def shortened(text: str, limit: int = 80) -> str:
    """Return a text as messages show it: printable, its middle left out where it is longer than `limit`."""
    text = text if text.isprintable() else ascii(text)
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shortened((reason.strip().splitlines() or [type(error).__name__])[0], 100)
