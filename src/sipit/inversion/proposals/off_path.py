"""What tokens checked behind a wrong one still tell.

Their states are off, so no check counts. But a right token behind a wrong prefix is off by much less
than a wrong token, and how much less is learned from the positions already settled. Tokens that were run
behind one wrong path share what it puts them off by, so among them the nearest is right far more often
than its distance alone says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.judging.check import Checked

_LEAST, _MOST = -7.0, 7.0  # nats that one distance may count
_SLOPE = 16.0  # nats that a token is behind the nearest one beside it, by the log of their distances; 8 to 32 alike
_FAR = 1e6  # of the scale: a state that overflowed counts as so far away


@dataclass
class _Population:
    """Logarithms of distances, as a normal distribution that starts from a guess."""

    mean: float
    deviation: float
    count: float  # how many observations the guess is worth

    def __post_init__(self) -> None:
        self._squares = self.count * self.deviation**2

    def add(self, x: float) -> None:
        self.count += 1
        step = x - self.mean
        self.mean += step / self.count
        self._squares += step * (x - self.mean)
        self.deviation = max(0.1, math.sqrt(self._squares / self.count))

    def log_density(self, x: float) -> float:
        return -0.5 * ((x - self.mean) / self.deviation) ** 2 - math.log(self.deviation)


class OffPathEvidence:
    """Distances of tokens that were checked at positions ahead, behind a token that proved wrong.

    Args:
        observed: the observed states. (T, D)
    """

    def __init__(self, observed: Tensor) -> None:
        middle = observed[1:].mean(dim=0) if len(observed) > 2 else torch.zeros_like(observed[0])
        self._scales = (observed - middle).norm(dim=1).clamp(min=1e-30).cpu()  # (T,)
        # position → token → logs of its distance and of the least beside it, over the scale
        self._heard: dict[int, dict[int, tuple[float, float]]] = {}
        self._right = _Population(math.log(0.25), 1.0, 10)
        self._wrong = _Population(math.log(0.9), 0.35, 10)

    def note(self, position: int, checked: Checked) -> None:
        """Take note of tokens checked at a position behind one wrong path; the last word on each counts."""
        relative = (checked.distances.cpu().double() / self._scales[position]).nan_to_num(_FAR, posinf=_FAR)
        logs = relative.clamp(1 / _FAR, _FAR).log()
        least = float(logs.min())
        told = {token_id: (x, least) for token_id, x in zip(checked.token_ids.tolist(), logs.tolist(), strict=True)}
        self._heard.setdefault(position, {}).update(told)

    def evidence(self, position: int) -> dict[int, float]:
        """Return for each token overheard at a position the nats its distance speaks for it."""
        heard = self._heard.get(position, {})
        return {i: max(self._nats(least) - _SLOPE * (x - least), _LEAST) for i, (x, least) in heard.items()}

    def settle(self, position: int, token_id: int) -> None:
        """Learn from a position whose token is known now."""
        for other, (x, _) in self._heard.pop(position, {}).items():
            (self._right if other == token_id else self._wrong).add(x)

    def _nats(self, x: float) -> float:
        low, high = sorted((self._right.mean, self._wrong.mean))
        x = min(max(x, low), high)  # beyond the means the tails of two fitted normals mean nothing
        return min(max(self._right.log_density(x) - self._wrong.log_density(x), _LEAST), _MOST)
