"""Which layers a measurement looks at where nobody names any."""

from __future__ import annotations

from sipit.models import LanguageModel
from sipit.observations import Cut


def every_cut(lm: LanguageModel) -> list[Cut]:
    """Return the states after each block, and after the final norm."""
    return [*(Cut(layer) for layer in range(1, lm.n_layers + 1)), lm.final_cut]


def few_cuts(lm: LanguageModel) -> list[Cut]:
    """Return layers 1, L/2 and L, as the paper's tables have them, and the states after the final norm."""
    return [*(Cut(layer) for layer in sorted({1, max(1, lm.n_layers // 2), lm.n_layers})), lm.final_cut]
