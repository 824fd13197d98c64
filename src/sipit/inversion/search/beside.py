"""Which tokens may fit beside one that does: what must be checked too before that one is accepted."""

from __future__ import annotations

from sipit.inversion.inverses.token_keys import token_keys
from sipit.inversion.judging.check import PackedCheck
from sipit.models import LanguageModel

# Radius, over how far rows spread, from which rows that point alike are looked for: below it they lie a hundred radii
# away and more. And the radii within which one of them counts: no token was seen to spread rows so much less.
_WIDE = 1 / 150
_RADII = 64.0
_ALIKE = 0.8  # cosine of keys from which a token may fit beside another where the tolerance is not coarse
_RIVALS = 48  # tokens checked beside one that fits by a tolerance that is not narrow, at most
_REMEMBERED = 1 << 14  # answers to which tokens may fit beside one, at most


class Beside:
    """Names the tokens that may fit where another one does, for one search."""

    def __init__(self, lm: LanguageModel, check: PackedCheck) -> None:
        self._lm = lm
        self._check = check
        self._known: dict[tuple[int, int, bool], tuple[float, list[int]]] = {}

    def of(self, token_id: int, row: int, *, is_own: bool = True) -> list[int]:
        """Return tokens that may fit where this one does, by some row, the likeliest first.

        Those with nearly the same embedding row, and those whose rows are so near that the tolerance may
        not tell their states apart, by what the cut can see of them. Where the tolerance is wide (coarse
        arithmetic, states stored rounded), also the nearest rows by direction, so that the best of them is
        accepted and not the first; and so where a later row alone tells of the token.

        Args:
            token_id: the token.
            row: position of the row.
            is_own: whether it is the token's own, or a later one.
        """
        check, lm = self._check, self._lm
        radius = check.alike_within(row)
        known = self._known.get((token_id, row, is_own))
        if known is not None and known[0] == radius:
            return known[1]
        found = lm.embeddings.twins(token_id)
        for ignores_mean in (False, True) if lm.ignores_mean(check.cut.spec) else (False,):
            near = lm.embeddings.within(token_id, radius, ignores_mean=ignores_mean)
            found = [*found, *(i for i in near if i not in found)]
        if not is_own or self._is_wide(row):
            is_coarse = check.is_coarse(row)
            near = token_keys(lm).nearest(token_id, _RIVALS, -1.0 if is_coarse else _ALIKE)
            if is_own and not is_coarse and near:
                near = lm.embeddings.near_by(token_id, near, _RADII * radius)
            found = [*found, *(i for i in near if i not in found)]
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[token_id, row, is_own] = (radius, found)
        return found

    def of_guesses(self, guesses: list[tuple[int, int]]) -> list[list[int]]:
        """Return what may fit where each guess (token, position) does, as far as that is found for less than a pass."""
        check, lm = self._check, self._lm
        found: list[list[int]] = [[] for _ in guesses]
        cheap = [i for i, (_, row) in enumerate(guesses) if lm.embeddings.is_quick(check.alike_within(row))]
        token_keys(lm).remember([guesses[i][0] for i in cheap if self._is_wide(guesses[i][1])])
        for i in cheap:
            found[i] = self.of(*guesses[i])
        return found

    def _is_wide(self, row: int) -> bool:
        return self._check.alike_within(row) > _WIDE * self._lm.embeddings.spread
