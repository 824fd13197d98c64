"""The prompts on which the noise of a cut is measured: the same on every machine and in every version.

Random ids with a run of one token, short ones for many first tokens, and, where there is a tokenizer,
a text of prose and code. The text is written out here, so that no interpreter or corpus changes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.models import LanguageModel

_LENGTHS = (48, 17)  # tokens of the calibration prompts
_SHORT, _FIRSTS = 5, 8  # length and number of prompts for more first tokens, whose norm is extreme
_TEXT = """Dear all, the meeting moves to Thursday at 9:30; please bring last month's figures.

The quick summary below holds 3 parts: what was asked, what was found (see Table 2), and what is
left to do. "Nothing is ever quite finished," she said, and closed the door behind her.

def total(rows, *, start=0.0):
    for number, row in enumerate(rows):
        if row is None or row["price"] < 0:
            raise ValueError(f"row {number} has no price")
        start += row["price"] * row.get("count", 1)
    return start  # 17 of 2580, 44.71 %
"""


def calibration_prompts(lm: LanguageModel) -> list[Tensor]:
    """Return the prompts a cut's noise is measured on, none longer than the model takes. (T,) each."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for wanted in (*_LENGTHS, *[_SHORT] * _FIRSTS):
        length = min(wanted, lm.max_positions or wanted)
        ids = torch.randint(lm.vocab_size, (length,), generator=generator)
        ids[length // 2 : length // 2 + length // 8] = ids[length // 2]
        prompts.append(ids)
    if lm.tokenizer is not None:
        ids = torch.tensor(lm.tokenizer(_TEXT)["input_ids"], dtype=torch.long)
        ids = ids[ids < lm.vocab_size][: min(_LENGTHS[0], lm.max_positions or _LENGTHS[0])]
        prompts += [ids] if len(ids) else []
    return prompts
