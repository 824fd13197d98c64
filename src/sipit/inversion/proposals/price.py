"""What one more packed pass costs, and how many guesses are worth checking in one."""

from __future__ import annotations

from collections.abc import Sequence

from sipit.models import LanguageModel
from sipit.models.pass_cost import tokens_a_pass

LONG = 512  # tokens of a prompt from which the likelihood saves many passes


def pass_price(lm: LanguageModel, n_sharing: int = 1) -> float:
    """Return what one more pass may cost in wasted tokens, on this machine.

    Every pass has a cost of its own, whatever it checks; prompts that share their passes share it.
    """
    return tokens_a_pass(lm) / n_sharing


def n_worth_checking(chances: Sequence[float], price: float) -> int:
    """Return how many of some tokens, best first, to check in one pass: at least 1.

    A token is checked along if it saves a later pass more often, by the price of a pass, than the
    better ones make it useless.
    """
    n_worth, before = 0, 0.0
    for chance in chances:
        if chance * price < before:
            break
        n_worth += 1
        before += chance
    return max(1, n_worth)
