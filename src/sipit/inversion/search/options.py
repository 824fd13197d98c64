"""How to search, declared once, and what is told while a search runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sipit.errors import OptionError
from sipit.inversion.evidence.result import PositionEvidence
from sipit.models import pass_named


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a running search stands."""

    seq_len: int
    input_ids: tuple[int, ...]  # accepted so far
    n_checked: int
    n_passes: int
    block_tokens: int
    seconds: float
    positions: tuple[PositionEvidence, ...] = ()  # the evidence of what was accepted


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search; see `sipit.invert`."""

    policy: str = "auto"
    noise: float = 0.0
    exhaustive: bool = False
    max_batch: int = 256
    seed: int = 0
    use_fit: bool = True
    hint: Sequence[int] = ()
    on_progress: OnProgress | None = None
    pass_dtype: str | None = None  # one of `PASSES`, of the pass that left the rows; None: the model's
    patience: int | None = None  # candidates checked in vain at a position that end a search; None: the vocabulary

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise OptionError(f"max_batch is {self.max_batch}; a packed pass needs at least 1 candidate")
        if not 0 <= self.noise < float("inf"):
            raise OptionError(f"noise is {self.noise}; it is a finite L2 distance, 0 or more")
        if self.pass_dtype is not None:
            pass_named(self.pass_dtype)
            if self.noise or self.exhaustive:
                raise OptionError(
                    "rows of a pass in another dtype take neither noise nor exhaustive; leave it out, or the pass dtype"
                )
