"""What one more packed pass costs, and how many guesses are worth checking in one."""

from __future__ import annotations

from torch import Tensor

LONG = 512  # tokens of a prompt at which a pass is worth one
_SHARED_PRICE = 0.25  # least, where prompts share their passes
_LOW_PRICE, _FULL_PRICE = 0.5, 2.0  # 0.4 to 5 were tried: less is more passes, more is up to a prefill of waste


def pass_price(seq_len: int, n_sharing: int = 1) -> float:
    """Return what one more pass may cost in wasted tokens.

    Every pass has a cost of its own, whatever it checks, and a window that is too long wastes tokens.
    Short prompts, of which a window easily wastes more than they have, are priced in tokens alone.
    Prompts that share their passes share that cost.
    """
    price = min(max(seq_len / LONG, _LOW_PRICE), _FULL_PRICE)
    return max(price / n_sharing, min(price, _SHARED_PRICE))


def n_worth_checking(chances: Tensor, price: float) -> int:
    """Return how many of some tokens, best first, to check in one pass. (N,) → at least 1.

    A token is checked along if it saves a later pass more often, by the price of a pass, than the
    better ones make it useless.
    """
    n_worth, before = 0, 0.0
    for chance in chances.tolist():
        if chance * price < before:
            break
        n_worth += 1
        before += chance
    return max(1, n_worth)
