"""How much a decoding behind noise may cost, on the device at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Numbers of tokens and prompts that are tried. By default what a processor runs in a minute or so."""

    n_beams: int = 64
    n_shown: int = 96  # tokens run at each position to know what the map misses there
    n_candidates: tuple[int, ...] = (128, 256)  # more that are run in turn, the likeliest over all beams
    n_surprised: int = 4096  # run in all at positions where nothing fits
    n_at_one: int = 1536  # run at one such position: what they do not explain is no token that was missed
    n_more: int = 256  # run there at a time
    n_replaced: int = 16  # tokens tried in place of each of the prompt that was found
    halving: tuple[tuple[int, int], ...] = ((1, 128), (4, 48))  # rows that judge these, and how many go on from there
    max_batch: int = 256  # tokens in one packed pass


# Of the first searches, while the noise is still being estimated.
QUICK = Effort(n_beams=16, n_shown=64, n_candidates=(64, 64), n_surprised=1024)

# Where a pass of a thousand tokens costs little more than one of a hundred.
WIDE = Effort(
    n_beams=128,
    n_shown=512,
    n_candidates=(1024, 2048),
    n_surprised=49_152,
    n_at_one=16_384,
    n_more=2048,
    n_replaced=256,
    halving=((0, 2048), (1, 512), (4, 96)),
    max_batch=1024,
)


def effort_on(device: torch.device, *, is_quick: bool = False) -> Effort:
    """Return the effort that a device deserves; of a first search, where asked for."""
    usual = WIDE if device.type == "cuda" else Effort()
    return replace(QUICK, max_batch=usual.max_batch) if is_quick else usual
