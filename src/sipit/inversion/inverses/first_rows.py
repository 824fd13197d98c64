"""Of which layer and token a first row may be: a search over all cuts at once, by direction alone.

A prompt's first state depends on its first token and nothing else, so one pass of some tokens through the
whole model shows what first rows look like everywhere. This proposes; whoever asks has to check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sipit.inversion.inverses.ridge import ridge
from sipit.inversion.inverses.sampled_ids import spread_ids
from sipit.inversion.inverses.token_keys import token_keys
from sipit.models import LanguageModel
from sipit.models.everywhere import everywhere
from sipit.observations import Cut

_ANCHORS = 512  # tokens that show what first rows look like
_BATCH = 256  # tokens run at once
_UNLIKE = 8.0  # spreads from the mean first row: nine in ten tokens lie within two, the oddest within five
_GUESSED = (32, 256, 2048)  # tokens tried of each likely cut, in turn, before the whole vocabulary
_LIKELY_CUTS = 4  # cuts that are guessed at
_NEAR = 0.25  # spreads from a token's row that make it worth a check; a token at random lies 1.4 away
_LEAST_SPREAD = 1e-7  # of a row of length 1: float32 holds no more


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """A token whose first row at a cut points where the given row does."""

    cut: Cut
    token_id: int
    distance: float  # from its row of length 1 to the given one, over the spread of such rows at the cut
    runner_up: float  # that of the best other token tried


@dataclass(frozen=True, kw_only=True)
class _Looks:
    """What first rows look like at one cut, each brought to length 1."""

    anchors: Tensor  # (N, W) in half precision, standardised
    mean: Tensor  # (W,)
    spread: Tensor  # (W,)

    def unlikeness(self, rows: Tensor) -> Tensor:
        """Return how many spreads rows lie from the mean. (N, W) → (N,)."""
        z = (nn.functional.normalize(rows, dim=1) - self.mean) / self.spread
        return z.square().mean(dim=1).sqrt()


class FirstRows:
    """What first rows look like at some cuts of one width.

    Args:
        lm: the model.
        cuts: where rows may come from.
    """

    def __init__(self, lm: LanguageModel, cuts: Sequence[Cut]) -> None:
        self._lm = lm
        self._anchor_ids = spread_ids(lm.vocab_size, _ANCHORS, torch.Generator().manual_seed(3))
        rows: dict[Cut, list[Tensor]] = {}
        for batch in self._anchor_ids.split(_BATCH):
            for cut, values in everywhere(lm, batch[:, None], cuts):
                rows.setdefault(cut, []).append(nn.functional.normalize(values[:, 0].float(), dim=1).cpu())
        self._looks = {cut: _looks(torch.cat(parts)) for cut, parts in rows.items()}

    def is_like_a_first_one(self, row: Tensor, cut: Cut) -> bool:
        """Return whether a row (W,) looks as first rows do at one cut."""
        return cut not in self._looks or float(self._looks[cut].unlikeness(row[None].float().cpu())) < _UNLIKE

    def likely_cuts(self, row: Tensor) -> list[Cut]:
        """Return the cuts a first row may come from, the likeliest first. (W,)."""
        found = {cut: float(looks.unlikeness(row[None].float())) for cut, looks in self._looks.items()}
        return sorted((cut for cut, far in found.items() if far < _UNLIKE), key=found.__getitem__)

    def first_like(self, rows: Tensor) -> list[int]:
        """Return which rows may be first ones of some cut. (N, W)."""
        far = torch.stack([looks.unlikeness(rows.float()) for looks in self._looks.values()]).amin(dim=0)
        return [int(i) for i in (far < _UNLIKE).nonzero()[:, 0]]

    def likenesses(
        self,
        row: Tensor,
        *,
        blur: Tensor | None = None,
        token_ids: Sequence[int] = (),
        is_thorough: bool = True,
    ) -> list[Likeness]:
        """Return tokens and cuts whose first rows point where a row does, the nearest first.

        Args:
            row: (W,)
            blur: how far each coordinate may be off, by rounding: (W,)
            token_ids: tokens to try before all others.
            is_thorough: whether the whole vocabulary is tried where guesses fail.
        """
        row = row.float().cpu()
        cuts = self.likely_cuts(row)
        if not cuts:
            return []
        length = float(row.norm())
        unit = row / max(length, 1e-30)
        spreads = {cut: self._looks[cut].spread for cut in cuts}
        if blur is not None:
            spreads = {cut: torch.hypot(spread, blur.float().cpu() / length) for cut, spread in spreads.items()}
        best: dict[Cut, Likeness] = {}
        tried: set[int] = set()
        for guesses in self._guesses(row, cuts, token_ids, is_thorough):
            tokens = [token for token in guesses if token not in tried]
            tried.update(tokens)
            if tokens:
                self._try(tokens, unit, spreads, best)
            near = [like for like in best.values() if like.distance < min(_NEAR, like.runner_up / 2)]
            if near:
                return sorted(near, key=lambda like: like.distance)
        return []

    def _guesses(
        self, row: Tensor, cuts: Sequence[Cut], token_ids: Sequence[int], is_thorough: bool
    ) -> Iterator[Sequence[int]]:
        """Yield tokens to try: those given, the best of each likely cut by a regression, then all others."""
        if token_ids:
            yield token_ids
        keys = token_keys(self._lm)
        wanted = keys.keys(self._anchor_ids).cpu()
        ranked = []
        for cut in cuts[:_LIKELY_CUTS]:
            looks = self._looks[cut]
            z = (nn.functional.normalize(row[None], dim=1) - looks.mean) / looks.spread
            query = ridge(looks.anchors.float(), wanted, strength=1e-3)(z)
            scores = keys.scores(query.to(self._lm.device))[0]
            ranked.append(scores.topk(min(_GUESSED[-1], len(scores))).indices.tolist())
        for n in _GUESSED:
            yield list(dict.fromkeys(token for tokens in ranked for token in tokens[:n]))
        if is_thorough:
            yield range(self._lm.vocab_size)

    def _try(self, tokens: Sequence[int], unit: Tensor, spreads: dict[Cut, Tensor], best: dict[Cut, Likeness]) -> None:
        """Run tokens through the model and note the nearest at each cut."""
        for batch in torch.tensor(tokens).split(_BATCH):
            for cut, values in everywhere(self._lm, batch[:, None], list(spreads)):
                rows = nn.functional.normalize(values[:, 0].float(), dim=1).cpu()
                far = ((rows - unit) / spreads[cut]).square().mean(dim=1).sqrt()  # (N,)
                nearest, second = far.topk(min(2, len(far)), largest=False).values.tolist()[:2] + [math.inf] * (
                    len(far) < 2
                )
                token_id, before = int(batch[far.argmin()]), best.get(cut)
                if before is not None and before.token_id == token_id:
                    second = min(second, before.runner_up)
                elif before is not None and before.distance <= nearest:
                    token_id, nearest, second = before.token_id, before.distance, min(before.runner_up, nearest)
                elif before is not None:
                    second = min(second, before.distance)
                best[cut] = Likeness(cut=cut, token_id=token_id, distance=nearest, runner_up=second)


def _looks(rows: Tensor) -> _Looks:
    """Return what rows of length 1 look like. (N, W)."""
    mean, spread = rows.mean(dim=0), rows.std(dim=0)
    spread = spread + 1e-2 * spread.mean() + _LEAST_SPREAD
    return _Looks(anchors=((rows - mean) / spread).half(), mean=mean, spread=spread)


def first_rows(lm: LanguageModel, cuts: Sequence[Cut]) -> FirstRows:
    """Return what first rows look like at some cuts of a model, made once."""
    return lm.derived(("first rows", tuple(cuts)), lambda: FirstRows(lm, cuts))
