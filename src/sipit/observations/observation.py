"""The states of one prompt as they leaked. Knows nothing of models, and never holds the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.errors import InputError, NonFiniteError, OptionError, ShapeError
from sipit.observations.cut import SITES, Cut, Site

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype called `name`.

    Raises:
        OptionError: no such floating-point dtype is supported.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    try:
        return DTYPES[name]
    except KeyError:
        raise OptionError(f"dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """The leaked values of one prompt.

    Raises:
        ShapeError: `states` is not two-dimensional, or is empty.
        NonFiniteError: `states` holds NaN or infinity.
        InputError: `positions` does not name each row once, rising.
        OptionError: `site` is unknown, or `layer` is not a whole number from 0.
    """

    states: Tensor  # (seq_len, d_model), as stored
    layer: int  # blocks run
    site: Site = "block"
    positions: tuple[int, ...] = ()  # position of each row; () means one after the other behind the known prefix
    known_prefix: tuple[int, ...] = ()  # token ids before the first row, where they are known: (P,)
    model: str | None = None  # what the model was called where the states were captured
    fingerprint: str | None = None  # of that model's weights, if known
    half_step: Tensor | None = None  # (seq_len, d_model) most that a rounding coarser than the dtype's moved each
    # value; inf where the value is not held, as of logits of which the k largest are
    is_last: bool = False  # whether the rows are those of the prompt's last tokens, and its length is not known

    def __post_init__(self) -> None:
        states = self.states.detach()  # a pass that was not told to leave gradients out ties its states to a graph
        object.__setattr__(self, "states", states)
        if self.site not in SITES:
            raise OptionError(f"site {self.site!r} is unknown; choose one of {', '.join(SITES)}")
        if type(self.layer) is not int:
            raise OptionError(f"layer {self.layer!r} is not a whole number; count the blocks run, from 0")
        if self.layer < 0:
            raise OptionError(f"layer {self.layer} is negative; count the blocks run, from 0")
        if states.ndim != 2 or states.dtype not in DTYPES.values():
            raise ShapeError(
                f"states have shape {tuple(states.shape)} and dtype {states.dtype}, expected (seq_len, d_model) in "
                f"{', '.join(DTYPES)}: pass one prompt, without a batch dimension"
            )
        if states.shape[0] == 0 or states.shape[1] == 0:
            raise ShapeError(f"states of shape {tuple(states.shape)} hold no position; the prompt is empty")
        finite = torch.isfinite(states).all(dim=1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0, 0])
            raise NonFiniteError(
                f"states hold NaN or infinity at row {bad} of {states.shape[0]}; capture them again "
                "in a wider dtype (float16 overflows above 65,504)"
            )
        if not self.positions:
            first = len(self.known_prefix)
            object.__setattr__(self, "positions", tuple(range(first, first + states.shape[0])))
        step = self.half_step
        if step is not None and (
            step.shape != states.shape
            or step.dtype != torch.float32
            or not bool((step >= 0).all() & (step < torch.inf).any(dim=1).all())
        ):
            raise InputError(
                f"half_step must be float32, 0 or more, finite somewhere in each row and of the states' shape "
                f"{tuple(states.shape)}, got {step.dtype} of shape {tuple(step.shape)}"
            )
        if self.is_last and (self.known_prefix or self.positions != tuple(range(states.shape[0]))):
            raise InputError(
                "rows of the last tokens of a prompt of unknown length have neither positions nor a known prefix"
            )
        if any(type(i) is not int for i in self.known_prefix):
            raise InputError("the known prefix holds something else than whole numbers; pass token ids")
        if len(self.positions) != states.shape[0] or any(
            later <= earlier for earlier, later in zip((-1, *self.positions), self.positions, strict=False)
        ):
            raise InputError(
                f"positions must name each of the {states.shape[0]} rows once and rise from 0 or more, "
                f"got {_shortened(self.positions)}"
            )

    @property
    def cut(self) -> Cut:
        """Where the states leaked."""
        return Cut(self.layer, self.site)

    @property
    def seq_len(self) -> int:
        """Number of rows held."""
        return int(self.states.shape[0])

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return int(self.states.shape[1])

    @property
    def dtype(self) -> str:
        """Name of the dtype the states are stored in."""
        return str(self.states.dtype).removeprefix("torch.")

    @property
    def n_positions(self) -> int:
        """Number of tokens of the whole prompt, as far as the rows tell: the last position and one."""
        return self.positions[-1] + 1

    @property
    def n_sought(self) -> int:
        """Number of tokens behind the known prefix, up to that of the last row."""
        return self.n_positions - len(self.known_prefix)

    @property
    def is_complete(self) -> bool:
        """Whether every position behind the known prefix is held."""
        first = len(self.known_prefix)
        return self.positions == tuple(range(first, first + self.seq_len))

    @property
    def is_partial(self) -> bool:
        """Whether some values of its rows are not held."""
        return self.half_step is not None and bool(self.half_step.isinf().any())

    def behind(self, known_prefix: Iterable[int]) -> Observation:
        """Return this observation with the token ids that stand before its first row; itself where there are none.

        Rows whose file names no position, or position 0, start behind the prefix. Where the file names a later
        position, those between are holes.

        Raises:
            OptionError: it brings another known prefix, or its rows start elsewhere.
        """
        ids = tuple(int(i) for i in known_prefix)
        if not ids:
            return self
        if self.is_last:
            raise OptionError("the rows are of the last tokens of a prompt of unknown length; leave the prefix out")
        if self.known_prefix and self.known_prefix != ids:
            raise OptionError("the observation brings its own known prefix, which is another one; leave yours out")
        first = self.positions[0]
        if 0 < first < len(ids):
            raise OptionError(
                f"the rows start at position {first}, but the known prefix has {len(ids)} tokens; pass those "
                "before the first row, the BOS token included"
            )
        shift = len(ids) if first == 0 else 0
        return replace(self, known_prefix=ids, positions=tuple(p + shift for p in self.positions))

    def last_rows(self, n: int) -> Observation:
        """Return the last n rows, without anything that tells how many tokens came before them.

        Raises:
            OptionError: it does not hold so many rows up to its last position, or brings a known prefix.
        """
        first, end = self.seq_len - n, self.positions[-1] + 1
        if n < 1 or first < 0 or self.known_prefix or self.positions[first:] != tuple(range(end - n, end)):
            raise OptionError(
                f"the observation does not hold its last {n} rows without a hole and without a known prefix"
            )
        step = None if self.half_step is None else self.half_step[first:]
        return replace(
            self,
            states=self.states[first:],
            half_step=step,
            positions=tuple(range(n)),
            is_last=True,
        )

    def ending_at(self, length: int) -> Observation:
        """Return this observation with its rows at the end of a prompt of so many tokens, at least as many as rows."""
        return replace(self, positions=tuple(range(length - self.seq_len, length)), is_last=False)

    def arranged(self, *, row_order: Sequence[int] = (), column_order: Sequence[int] = ()) -> Observation:
        """Return this observation with its rows and columns in another order; () leaves them as they are.

        Args:
            row_order: (seq_len,) row of this observation at each place.
            column_order: (d_model,) column of it at each coordinate.

        Raises:
            InputError: an order does not name each row or column once.
        """
        states, half = self.states, self.half_step
        for dim, order, what in ((0, row_order, "rows"), (1, column_order, "columns")):
            if not order:
                continue
            if sorted(order) != list(range(states.shape[dim])):
                raise InputError(f"an order of the {states.shape[dim]} {what} names each of them once, from 0")
            index = torch.tensor(order, device=states.device)
            states = states.index_select(dim, index)
            half = None if half is None else half.index_select(dim, index)
        return replace(self, states=states, half_step=half)

    def digest(self) -> str:
        """Return the SHA-256 of the stored values, dtype, shape, place and rounding, as hexadecimal digits."""
        states = self.states.detach().contiguous().cpu()
        head = f"{self.dtype} {tuple(states.shape)} {self.site} {self.layer} {self.positions}\n"
        hashed = hashlib.sha256(head.encode() + states.view(torch.uint8).numpy().tobytes())
        if self.half_step is not None:
            hashed.update(b"half_step" + self.half_step.detach().contiguous().cpu().numpy().tobytes())
        return hashed.hexdigest()


def _shortened(positions: tuple[int, ...]) -> str:
    text = ", ".join(map(str, positions[:8]))
    return f"[{text}{', …' if len(positions) > 8 else ''}]"
