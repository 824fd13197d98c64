"""From tokens to the states they may have: a map with its errors, by which a noisy row ranks all tokens.

An inverse from states to tokens is thrown off by noise; a map in the other direction is not, for the noise and the
map's own error add up to one normal law. What it maps is the row that each token has behind one short text, run once:
behind other text it is another, which a linear map and a kernel regression learn from some thousand tokens behind
texts that the model writes. It proposes; whoever asks runs the best tokens through the model.

Shapes: W = width of a row, S = width of the rows as compared (W, or fewer where W is the vocabulary's), V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.inverses.sampled_ids import spread_ids
from sipit.inversion.judging.calibration import calibration_prompts
from sipit.inversion.judging.meter import Meter
from sipit.inversion.noise.kernel_errors import kernel_errors, standard_of
from sipit.inversion.noise.prior import TokenPrior
from sipit.models import LanguageModel
from sipit.models.kept import KeptFile, kept_tensors
from sipit.observations import Cut

_TEXT = 4  # tokens of the short text
_WRITINGS, _LENGTHS = 16, (2, 6, 14, 30)  # texts that the model writes, and where tokens are run behind each
_LIKELY, _ANY = 40, 32  # tokens run behind a text: such as the model expects there, and any
_SHARE = 16  # of a small vocabulary, one in so many is enough of each
_WARM = 1.5  # temperature at which the expected ones are drawn
_STRENGTH = 1.0  # of the ridge of what the linear map misses: few tokens of many prefixes show it
_ROWS = 4096  # of the vocabulary a time
_PROMPTS, _LENGTH = 24, 48  # random prompts that show how rows differ
_BATCH = 256  # tokens in one packed pass
_RIDGE = 1e-2  # of the mean squared length of a row in the table
_SINK = 3.0  # times the median length: rows beyond it are of another kind, and shape no covariance
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

    def made() -> Tensor:
        return _behind(lm, cut, torch.empty(0, dtype=torch.long), meter)

    def from_tensors(tensors: dict[str, Tensor]) -> Tensor | None:
        rows = tensors["rows"]
        return rows.to(lm.device) if rows.shape == (lm.vocab_size, lm.width(cut)) else None

    def read() -> Tensor:
        file = KeptFile(kind="first-rows", name=f"{cut.site}-{cut.layer}", version=1)
        return kept_tensors(lm, file, made, to_tensors=lambda rows: {"rows": rows}, from_tensors=from_tensors)

    return lm.derived(("noise, first rows", cut), read)


def token_map(lm: LanguageModel, cut: Cut, meter: Meter) -> TokenMap:
    """Return the map of a cut, made once; the search that needs it first pays for it."""

    def to_tensors(mapped: TokenMap) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(mapped).items() if tensor is not None}

    def read() -> TokenMap:
        file = KeptFile(kind="token-maps", name=f"{cut.site}-{cut.layer}", version=2)
        return kept_tensors(
            lm,
            file,
            lambda: _made(lm, cut, meter),
            to_tensors=to_tensors,
            from_tensors=lambda tensors: _restored(lm, tensors),
        )

    return lm.derived(("token map", cut), read)


def _restored(lm: LanguageModel, tensors: dict[str, Tensor]) -> TokenMap | None:
    """Return the map that a file holds, or None where its tensors are no map of this vocabulary."""
    known = {name: tensor.to(lm.device) for name, tensor in tensors.items()}
    projection = known.pop("projection", None)
    if set(known) | {"projection"} != {field.name for field in fields(TokenMap)}:
        return None
    found = TokenMap(**known, projection=projection)
    width = found.mean.numel()
    shapes = {"table": (lm.vocab_size, width), "mean": (width,), "centre": (width,)}
    shapes |= dict.fromkeys(("error", "within", "covariance"), (width, width))
    return found if all(getattr(found, name).shape == shape for name, shape in shapes.items()) else None


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
    samples = _samples(lm, cut, meter, generator)
    ids, rows = samples.token_ids.to(table.device), compared(samples.rows)
    usual = _are_ordinary(rows)
    ids, rows, groups = ids[usual], rows[usual], samples.groups[usual.cpu()].to(table.device)
    # What a prefix adds to the rows of all tokens is no property of a token, so the maps are made without it.
    y = rows - _means(rows, groups)[groups]
    x = table[ids] - _means(table[ids], groups)[groups]
    weight = _ridge(x, y)  # (S, S)
    features = standard_of(table)(table)
    table = table @ weight
    errors = rows - table[ids]
    learned = kernel_errors(features[ids], errors - _means(errors, groups)[groups], strengths=[_STRENGTH])
    for part in torch.arange(lm.vocab_size, device=table.device).split(_ROWS):
        table[part] += learned.predicted(features[part])
    offsets = _means(rows - table[ids], groups)  # (G, S)
    mean = offsets.mean(dim=0)
    within = _covariance(learned.left_out)
    prompts = spread_ids(lm.vocab_size, _PROMPTS * min(_LENGTH, longest), generator).view(_PROMPTS, -1)
    meter.spend(prompts.numel(), cut.layer)
    later = compared(torch.cat([lm.cut(cut).ordinary(ids)[1:] for ids in prompts]))
    later = later[_are_ordinary(later)]
    return TokenMap(
        table=table,
        mean=mean,
        error=within + _covariance(offsets - mean),
        within=within,
        projection=projection,
        centre=later.mean(dim=0),
        covariance=torch.cov(as_float64(later.T)).to(later).reshape(len(mean), -1),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Samples:
    """Tokens that were run behind prefixes of several kinds. N tokens."""

    token_ids: Tensor  # (N,)
    rows: Tensor  # (N, W) float32
    groups: Tensor  # (N,) the prefix of each


def _samples(lm: LanguageModel, cut: Cut, meter: Meter, generator: torch.Generator) -> _Samples:
    """Run tokens behind texts that the model writes: such as it expects there, and such as the vocabulary holds."""
    longest = (lm.max_positions or _LENGTH) - 1
    prior = TokenPrior(lm, torch.empty(0, dtype=torch.long), meter, max_batch=_BATCH, seq_len=longest + 1)
    most = max(1, lm.vocab_size // _SHARE)
    texts = torch.empty(_WRITINGS, 0, dtype=torch.long)
    tokens: list[Tensor] = []
    rows: list[Tensor] = []
    groups: list[Tensor] = []
    for length in range(min(_LENGTHS[-1], longest) + 1):
        chances = prior.probabilities.cpu().expand(_WRITINGS, -1)  # (B, V)
        if length in _LENGTHS:
            likely = (chances.log() / _WARM).softmax(dim=1)
            for text, share in zip(texts, likely, strict=True):
                drawn = torch.multinomial(share, min(_LIKELY, most), generator=generator)
                ids = torch.cat([drawn, spread_ids(lm.vocab_size, min(_ANY, most), generator)]).unique()
                tokens.append(ids)
                rows.append(_behind(lm, cut, text, meter, ids))
                groups.append(torch.full_like(ids, len(groups)))
        drawn = torch.multinomial(chances, 1, generator=generator)
        texts = torch.cat([texts, drawn], dim=1)
        prior.grow(drawn[:, 0], torch.zeros(_WRITINGS, dtype=torch.long) if not length else torch.arange(_WRITINGS))
    return _Samples(token_ids=torch.cat(tokens), rows=torch.cat(rows), groups=torch.cat(groups))


def _means(rows: Tensor, groups: Tensor) -> Tensor:
    """Return the mean row of each group. (N, S), (N,) → (G, S)."""
    n = int(groups.max()) + 1
    counts = torch.bincount(groups, minlength=n).clamp(min=1)[:, None]
    return torch.zeros(n, rows.shape[1]).to(rows).index_add_(0, groups, rows) / counts


def _are_ordinary(rows: Tensor) -> Tensor:
    """Return which rows are not far longer than the others. (N, S) → (N,) bool."""
    lengths = rows.norm(dim=1)
    usual: Tensor = lengths <= _SINK * lengths.median()
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
