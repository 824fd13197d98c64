"""From tokens to the states they may have: a linear map with its errors, which ranks all tokens by a noisy row.

An inverse from states to tokens is thrown off by noise; a map in the other direction is not, for the noise and the
map's own error add up to one normal law. What it maps is the row that each token has behind one short text, run once:
behind another prefix most of the row is the same, but for an offset that a few tokens run there show.
It proposes; whoever asks runs the best tokens through the model.

Shapes: W = width of a row, S = width of the rows as compared (W, or fewer where W is the vocabulary's), V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.inverses.sampled_ids import spread_ids
from sipit.inversion.judging.calibration import calibration_prompts
from sipit.inversion.judging.meter import Meter
from sipit.models import LanguageModel
from sipit.observations import Cut

_TEXT = 4  # tokens of the short text
_PREFIXES, _BEHIND = (2, 5, 9, 14, 19, 24, 29, 34), 192  # lengths of random prefixes, and tokens run behind each
_PROMPTS, _LENGTH = 24, 48  # random prompts that show how rows differ
_BATCH = 256  # tokens in one packed pass
_RIDGE = 1e-2  # of the mean squared length of a row in the table
_SINK = 3.0  # times the median length: rows beyond it are of another kind, and shape no covariance
_UNMAPPED = 5e-4  # chance that a token's row is nothing like the map says: pieces of words, tokens taken for sinks
_WIDEST = 2048  # rows wider than this are compared by a random projection to half of it


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenMap:
    """The expected row of every token behind any prefix, and the covariances of what is left over."""

    table: Tensor  # (V, S) what the map says, but for the mean
    mean: Tensor  # (S,)
    error: Tensor  # (S, S) covariance of rows about what the map says
    within: Tensor  # (S, S) the same once the mean error behind a prefix is known
    projection: Tensor | None  # (W, S) orthonormal columns; None where rows are compared as they are
    centre: Tensor  # (S,) mean row of later positions
    covariance: Tensor  # (S, S) of rows of later positions

    def compared(self, rows: Tensor) -> Tensor:
        """Return rows as they are compared. (N, W) → (N, S)."""
        rows = rows.float()
        return rows if self.projection is None else rows @ self.projection

    def errors(self, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Return what the map misses of rows of tokens. (N, W), (N,) → (N, S)."""
        return self.compared(rows) - self.table[token_ids.to(self.table.device)] - self.mean


def first_rows_of_all(lm: LanguageModel, cut: Cut, meter: Meter) -> Tensor:
    """Return the rows of every token as a prompt's first one, made once. (V, W) float32."""
    key = ("noise, first rows", cut)
    return lm.derived(key, lambda: _behind(lm, cut, torch.empty(0, dtype=torch.long), meter))


def token_map(lm: LanguageModel, cut: Cut, meter: Meter) -> TokenMap:
    """Return the map of a cut, made once; the search that needs it first pays for it."""
    return lm.derived(("token map", cut), lambda: _made(lm, cut, meter))


def _behind(lm: LanguageModel, cut: Cut, prefix: Tensor, meter: Meter, ids: Tensor | None = None) -> Tensor:
    """Return the rows of tokens behind one prefix, of the whole vocabulary by default. (P,), (N,) → (N, W)."""
    model = lm.cut(cut)
    row = model.row(prefix)
    ids = torch.arange(lm.vocab_size) if ids is None else ids
    meter.spend(len(ids) + len(prefix), cut.layer)
    parts = ids.split(_BATCH)
    return torch.cat([row.run(part, torch.full_like(part, len(prefix))).float() for part in parts])


def _made(lm: LanguageModel, cut: Cut, meter: Meter) -> TokenMap:
    generator = torch.Generator().manual_seed(2)
    width, longest = lm.width(cut), lm.max_positions or _LENGTH
    projection = None
    if width > _WIDEST:
        drawn = torch.randn(width, _WIDEST // 2, generator=generator)
        projection = torch.linalg.qr(drawn).Q.to(lm.device)  # (W, S)

    def compared(rows: Tensor) -> Tensor:
        return rows.float() if projection is None else rows.float() @ projection

    text = calibration_prompts(lm)[-1][: min(_TEXT, longest - 1)]
    table = compared(_behind(lm, cut, text, meter))  # (V, S)
    table -= table.mean(dim=0)
    groups, rows_of_groups = [], []
    for length in _PREFIXES:
        prefix = spread_ids(lm.vocab_size, min(length, longest - 1), generator)
        groups.append(spread_ids(lm.vocab_size, _BEHIND, generator))
        rows_of_groups.append(compared(_behind(lm, cut, prefix, meter, groups[-1])))
    x, y = table[torch.stack(groups)], torch.stack(rows_of_groups)  # (G, N, S)
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    weight = _ridge(x.flatten(0, 1), y.flatten(0, 1))  # (S, S)
    left = _ordinary((y - x @ weight).flatten(0, 1))
    table = table @ weight
    prompts = spread_ids(lm.vocab_size, _PROMPTS * min(_LENGTH, longest), generator).view(_PROMPTS, -1)
    meter.spend(prompts.numel(), cut.layer)
    rows = compared(torch.cat([lm.cut(cut).ordinary(ids)[1:] for ids in prompts]))
    misses = rows - table[prompts[:, 1:].flatten()]
    mean = misses.median(dim=0).values
    usual = _ordinary(rows)
    return TokenMap(
        table=table,
        mean=mean,
        error=_covariance(_ordinary(misses - mean)),
        within=_covariance(left),
        projection=projection,
        centre=usual.mean(dim=0),
        covariance=torch.cov(as_float64(usual.T)).to(usual).reshape(len(mean), -1),
    )


def _ordinary(rows: Tensor) -> Tensor:
    """Return rows without those that are far longer than the others. (N, S) → (N', S)."""
    lengths = rows.norm(dim=1)
    usual: Tensor = rows[lengths <= _SINK * lengths.median()]
    return usual


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    gram = as_float64(x.T @ x)
    gram.diagonal().add_(_RIDGE * float(x.square().sum()) / len(x) + 1e-12)
    weight: Tensor = torch.linalg.solve(gram, as_float64(x.T @ y)).to(x)
    return weight


def _covariance(errors: Tensor) -> Tensor:
    """Return the covariance of errors of mean zero, a tenth of its diagonal added: few rows show it. (N, S)."""
    found = as_float64(errors.T @ errors / max(len(errors), 1))
    found.diagonal().mul_(1.1).add_(1e-12 + 1e-9 * float(found.diagonal().mean()))
    return found.to(errors)


class Ranking:
    """Log-likelihoods of noisy rows for every token, by a map whose error and the noise are added up.

    Args:
        mapped: of the cut.
        variances: of the noise on each coordinate: (W,).
        knows_offset: whether the mean error of the map behind the prefix is known.
    """

    def __init__(self, mapped: TokenMap, variances: Tensor, *, knows_offset: bool) -> None:
        self._mean = mapped.mean
        total = as_float64(mapped.within if knows_offset else mapped.error)
        if mapped.projection is not None:  # the projection mixes all coordinates
            variances = variances.mean().expand(len(total))
        total = total + variances.to(total).diag()
        # total⁻¹ = L⁻ᵀ L⁻¹ with total = L Lᵀ: rows times L⁻ᵀ are white
        lower = torch.linalg.cholesky(total)
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
        self._whitening = inverse.T.to(mapped.mean)
        self._image = mapped.table @ self._whitening  # (V, S)
        self._penalty = 0.5 * self._image.square().sum(dim=1)  # (V,)
        self._constant = -0.5 * len(lower) * math.log(2 * math.pi) - float(lower.diagonal().log().sum())

    def scores(self, rows: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return log-likelihoods of rows as compared, less known offsets. (N, S), (N, S) → (N, V)."""
        left = (rows - self._mean - (0 if offsets is None else offsets)) @ self._whitening  # (N, S)
        own = 0.5 * left.square().sum(dim=1, keepdim=True)
        found: Tensor = left @ self._image.T - self._penalty - own + self._constant
        return found


def with_unmapped(scores: Tensor) -> Tensor:
    """Return scores in which no token is as unlikely as the map says: its row may be nothing like that. (N, V)."""
    return torch.logaddexp(scores, scores.amax(dim=1, keepdim=True) + math.log(_UNMAPPED))
