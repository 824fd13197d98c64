"""How much a decoding behind noise may cost, on the device at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Numbers of tokens and prompts that are tried. By default what a processor runs in a minute or two."""

    n_beams: int = 96
    n_shown: int = 256  # tokens run at each position to know what the map misses there
    n_candidates: tuple[int, ...] = (512, 1024)  # more that are run in turn, the likeliest over all beams
    whole: Literal["never", "in doubt", "always"] = "never"  # when the vocabulary is run behind the best prompt
    n_surprised: int = 9216  # run in all at positions where nothing fits, if not the whole vocabulary
    n_at_one: int = 3072  # run at one such position: what they do not explain is no token that was missed
    n_more: int = 512  # run there at a time
    n_replaced: int = 128  # tokens tried in place of each of the prompt that was found
    # Rows behind a replaced token that it is judged by, and how many go on from there.
    halving: tuple[tuple[int, int], ...] = ((0, 1024), (1, 256), (4, 64))
    max_batch: int = 256  # tokens in one packed pass


# Of the first searches, while the noise is still being estimated.
QUICK = Effort(n_beams=16, n_shown=64, n_candidates=(64, 64), n_surprised=1024, n_at_one=1024, n_more=256)
WIDE = Effort(n_beams=128, whole="in doubt", n_replaced=512, halving=((0, 2048), (1, 512), (4, 96)))
_MOST_ON_GPU = 2048  # tokens in one packed pass, which costs little more there than one of a hundred


def effort_on(device: torch.device, *, is_quick: bool = False, is_whole: bool = False) -> Effort:
    """Return the effort that a device deserves: of a first search, or over the whole vocabulary, where asked for."""
    is_fast = device.type == "cuda"
    effort = QUICK if is_quick else WIDE if is_fast or is_whole else Effort()
    if is_whole and not is_quick:
        effort = replace(effort, whole="always")
    return replace(effort, max_batch=_MOST_ON_GPU) if is_fast else effort
