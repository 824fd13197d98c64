"""From tokens to the states they may have: a linear map with its errors, which ranks all tokens by a noisy row.

An inverse from states to tokens is thrown off by noise; a map in the other direction is not, for the noise and the
map's own error add up to one normal law. It proposes; whoever asks runs the best tokens through the model.

Shapes: W = width of a row, S = width of the rows as compared (W, or fewer where W is the vocabulary's), K = width of
a key, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.inversion.inverses.sampled_ids import spread_ids
from sipit.inversion.inverses.token_keys import TokenKeys, token_keys
from sipit.inversion.judging.meter import Meter
from sipit.models import LanguageModel
from sipit.observations import Cut

_PREFIXES, _BEHIND = (2, 5, 9, 14, 19, 24, 29, 34), 96  # lengths of random prefixes, and tokens run behind each
_PROMPTS, _LENGTH = 24, 48  # random prompts that show how rows differ
_FIRSTS = 1024  # tokens run as the first one
_FIRST_BATCH = 256  # tokens in one packed pass
_RIDGE = 1e-2  # of the mean squared length of a key
_WIDEST = 2048  # rows wider than this are compared by a random projection to half of it


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenMap:
    """The expected row of every token and the covariance of what is left over."""

    weight: Tensor  # (K, S)
    mean: Tensor  # (S,)
    error: Tensor  # (S, S) covariance of rows about what the map says
    within: Tensor  # (S, S) the same once the mean error behind a prefix is known

    def expected(self, keys: Tensor) -> Tensor:
        """Return the expected rows of tokens. (N, K) → (N, S)."""
        return keys @ self.weight + self.mean


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenMaps:
    """The maps of one cut: of a prompt's first position, and of the others."""

    keys: TokenKeys
    first: TokenMap
    rest: TokenMap
    projection: Tensor | None  # (W, S) orthonormal columns; None where rows are compared as they are
    centre: Tensor  # (S,) mean row of later positions
    covariance: Tensor  # (S, S) of rows of later positions
    block_tokens: int  # what making them cost

    def compared(self, rows: Tensor) -> Tensor:
        """Return rows as they are compared. (N, W) → (N, S)."""
        rows = rows.float()
        return rows if self.projection is None else rows @ self.projection


def token_maps(lm: LanguageModel, cut: Cut, meter: Meter) -> TokenMaps:
    """Return the maps of a cut, made once; the search that needs them first pays."""

    def made() -> TokenMaps:
        maps = _maps(lm, cut)
        meter.block_tokens += maps.block_tokens
        return maps

    return lm.derived(("token maps", cut), made)


def first_states(lm: LanguageModel, cut: Cut, meter: Meter) -> Tensor:
    """Return the rows of every token as a prompt's first one, made once. (V, W)."""

    def made() -> Tensor:
        model = lm.cut(cut)
        cache = model.new_cache()
        meter.spend(lm.vocab_size, cut.layer)
        parts = torch.arange(lm.vocab_size).split(_FIRST_BATCH)
        return torch.cat([model.packed(cache, ids, torch.zeros_like(ids)).float() for ids in parts])

    return lm.derived(("first states", cut), made)


def _maps(lm: LanguageModel, cut: Cut) -> TokenMaps:
    generator = torch.Generator().manual_seed(2)
    keys, model, width = token_keys(lm), lm.cut(cut), lm.width(cut)
    projection = None
    if width > _WIDEST:
        drawn = torch.randn(width, _WIDEST // 2, generator=generator)
        projection = torch.linalg.qr(drawn).Q.to(lm.device)  # (W, S)

    def compared(rows: Tensor) -> Tensor:
        return rows.float() if projection is None else rows.float() @ projection

    longest = lm.max_positions or _LENGTH
    grouped, group_keys = [], []
    for length in _PREFIXES:
        prefix = spread_ids(lm.vocab_size, min(length, longest - 1), generator)
        ids = spread_ids(lm.vocab_size, _BEHIND, generator)
        rows = model.packed(model.cache_of(prefix), ids, torch.full_like(ids, len(prefix)))
        grouped.append(compared(rows))
        group_keys.append(keys.keys(ids))
    prompts = spread_ids(lm.vocab_size, _PROMPTS * min(_LENGTH, longest), generator).view(_PROMPTS, -1)
    rows = compared(torch.cat([model.ordinary_batch(ids[None])[0, 1:] for ids in prompts]))
    firsts = spread_ids(lm.vocab_size, _FIRSTS, generator)
    first_rows = compared(model.packed(model.new_cache(), firsts, torch.zeros_like(firsts)))
    return TokenMaps(
        keys=keys,
        first=first_map(first_rows, keys.keys(firsts)),
        rest=_rest_map(torch.stack(grouped), torch.stack(group_keys), rows, keys.keys(prompts[:, 1:].flatten())),
        projection=projection,
        centre=rows.mean(dim=0),
        covariance=torch.cov(rows.T.double()).float(),
        block_tokens=cut.layer * (sum(_PREFIXES) + _BEHIND * len(_PREFIXES) + prompts.numel() + _FIRSTS),
    )


def _rest_map(grouped: Tensor, group_keys: Tensor, rows: Tensor, row_keys: Tensor) -> TokenMap:
    """Return the map of later positions. (G, N, S), (G, N, K), (M, S), (M, K)."""
    x = torch.cat([(group_keys - group_keys.mean(dim=1, keepdim=True)).flatten(0, 1), row_keys - row_keys.mean(dim=0)])
    y = torch.cat([(grouped - grouped.mean(dim=1, keepdim=True)).flatten(0, 1), rows - rows.mean(dim=0)])
    weight = _ridge(x, y)
    mean = rows.mean(dim=0) - row_keys.mean(dim=0) @ weight
    left = grouped - group_keys @ weight
    left = (left - left.mean(dim=1, keepdim=True)).flatten(0, 1)
    return TokenMap(
        weight=weight,
        mean=mean,
        error=_covariance(rows - row_keys @ weight - mean),
        within=_covariance(left),
    )


def first_map(rows: Tensor, keys: Tensor) -> TokenMap:
    """Return the map of a prompt's first position, from rows of tokens that were run there. (N, S), (N, K)."""
    weight = _ridge(keys - keys.mean(dim=0), rows - rows.mean(dim=0))
    mean = (rows - keys @ weight).mean(dim=0)
    error = _covariance(rows - keys @ weight - mean)
    return TokenMap(weight=weight, mean=mean, error=error, within=error)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    gram = (x.T @ x).double()
    gram.diagonal().add_(_RIDGE * float(x.square().sum()) / len(x) + 1e-12)
    return torch.linalg.solve(gram, (x.T @ y).double()).float()


def _covariance(errors: Tensor) -> Tensor:
    """Return the covariance of errors of mean zero, a tenth of its diagonal added: few rows show it. (N, S)."""
    found = (errors.T @ errors / len(errors)).double()
    found.diagonal().mul_(1.1)
    return found.float()


class Ranking:
    """Log-likelihoods of one noisy row, but for a constant, for every token: the map's error and the noise together.

    Args:
        maps: of the cut.
        token_map: of the position's kind.
        variance: of the noise on the compared coordinates: (S,).
        knows_offset: whether the mean error of the map behind this prefix is known.
    """

    def __init__(self, maps: TokenMaps, token_map: TokenMap, variance: Tensor, *, knows_offset: bool = False) -> None:
        self._keys, self._map = maps.keys, token_map
        total = (token_map.within if knows_offset else token_map.error).double() + variance.double().diag()
        precision = torch.linalg.inv(total)
        self._pull = (precision @ token_map.weight.double().T).float()  # (S, K)
        half = torch.linalg.cholesky(precision).float()  # (S, S)
        image = token_map.weight @ half  # (K, S): a key's expected row, whitened
        penalties = []
        for first in range(0, maps.keys.vocab_size, 8192):
            ids = torch.arange(first, min(first + 8192, maps.keys.vocab_size))
            penalties.append((maps.keys.keys(ids) @ image).square().sum(dim=1))
        self._penalty = 0.5 * torch.cat(penalties)  # (V,)

    def scores(self, rows: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return the score of every token for rows as compared, less the known offset. (N, S) → (N, V)."""
        left = rows - self._map.mean - (0 if offset is None else offset)
        return self._keys.scores(left.float() @ self._pull) - self._penalty
