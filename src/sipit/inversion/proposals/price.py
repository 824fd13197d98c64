"""What one more packed pass costs, and how many guesses are worth checking in one."""

from __future__ import annotations

from collections.abc import Sequence

from sipit.models import LanguageModel
from sipit.models.pass_cost import tokens_a_pass

_LONG = 512  # tokens of a prompt from which the likelihood spares many passes
_PAID = (0.25, 1.0)  # blocks above a layer, over blocks below it, that a short and a long prompt's likelihood pays for


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


def likelihood_pays(n_below: int, n_above: int, n_tokens: int) -> bool:
    """Return whether the model's own likelihood of a prompt spares more beside a fitted inverse than it costs.

    It costs a pass of the whole prompt through the blocks above the layer. Of a long prompt it spares about as many
    passes of a few tokens as one ordinary pass takes.
    """
    return n_above <= _PAID[n_tokens >= _LONG] * n_below
