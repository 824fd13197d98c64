"""One-step margins: how far apart the next tokens of a prefix lie, which bounds the noise an inversion bears.

Inversion stays exact while every observed state is off by less than half the margin (arXiv
2510.15511, theorem 3.2). The least distance among some next tokens is an upper bound of the margin. It
is close where the tokens are chosen well: two states can lie near each other where the embedding rows
of their tokens do, and which rows those are does not depend on the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sipit.collisions.continuations import continued_states, distinct_tokens
from sipit.collisions.nearest import nearest_pairs
from sipit.collisions.spread import PERCENTILES
from sipit.errors import MismatchError, OptionError
from sipit.models import LanguageModel
from sipit.observations import Cut, Site
from sipit.storage import LineLog

Pick = Literal["near", "random"]  # next tokens with near embedding rows, or any
PICKS: tuple[Pick, ...] = get_args(Pick)

_PAIRS = 8  # closest pairs of rows looked at for each token wanted: near rows come in clusters
_ROWS = 8192  # embedding rows read at a time
_BYTES = 1 << 30  # of the states of one prefix's next tokens held at once, about


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The two next tokens of one prefix that lie closest, of those tried."""

    distance: float  # L2
    relative_to_norm: float  # over the mean norm of the states tried
    tokens: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ExactMargin:
    """The margin of one prefix over every next token, beside the bound from those tried."""

    prefix: tuple[int, ...]  # token ids
    bound: float  # L2, over the tokens tried
    distance: float  # L2, over all tokens with different embedding rows
    tokens: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class MarginSurvey:
    """The one-step margins of many prefixes at one layer, over the tokens that were tried behind each."""

    layer: int
    site: Site
    n_prefixes: int
    n_tokens: int  # next tokens tried behind each prefix
    pick: Pick  # how they were chosen
    is_whole_vocabulary: bool  # of tokens with different rows; else each margin is an upper bound of the one over all
    least: float  # L2
    mean: float  # L2
    percentiles: tuple[tuple[float, float], ...]  # (per cent, L2)
    median_relative_to_norm: float  # of margin / mean norm of that prefix's states
    least_relative_to_norm: float
    least_prefix: tuple[int, ...]  # token ids of the prefix with the least margin
    least_tokens: tuple[int, int]  # the two next tokens that lie closest there
    exact: tuple[ExactMargin, ...]  # of the first n_exhaustive prefixes


def survey_margins(
    lm: LanguageModel,
    prefixes: Sequence[Tensor],
    cuts: Sequence[Cut],
    *,
    n_tokens: int | None = 256,
    pick: Pick = "near",
    n_exhaustive: int = 0,
    seed: int = 0,
    log: Path | str | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[MarginSurvey]:
    """Return the one-step margins at each cut. Of tokens with equal embedding rows one takes part.

    Args:
        lm: the model.
        prefixes: token ids, at least one each. (P,)
        cuts: (layer, site) pairs, of layers 1 to n_layers.
        n_tokens: next tokens tried behind each prefix; None: the whole vocabulary, which is the margin itself.
        pick: "near": those whose embedding rows lie closest to one another, see `closest_tokens`, the same
            behind every prefix; "random": drawn anew behind each.
        n_exhaustive: prefixes, the first ones, whose exact margin is computed beside the bound.
        seed: of the draws.
        log: a file that keeps each prefix's margins as they are found, a JSON line each; called again with it, a
            survey goes on where it stopped. More prefixes may be asked for then, and more exact ones.
        on_step: told the next tokens run and in all.

    Raises:
        OptionError: no prefix, fewer than two tokens, an unknown pick, or a layer below 1.
        MismatchError: the log is that of another model, other prefixes or other options.
        StorageError: the log cannot be written, or is no file of JSON lines.
    """
    if not prefixes or not cuts or any(layer < 1 for layer, _ in cuts):
        raise OptionError("margins need at least one prefix and layers of 1 or more")
    if pick not in PICKS or n_exhaustive < 0:
        raise OptionError(f"pick is one of {', '.join(PICKS)} and n_exhaustive 0 or more, got {pick!r}, {n_exhaustive}")
    everything, _ = distinct_tokens(lm, torch.arange(lm.vocab_size))
    n = len(everything) if n_tokens is None else min(n_tokens, len(everything))
    if n < 2:
        raise OptionError(f"n_tokens is {n}; a margin lies between at least 2 next tokens")
    generator = torch.Generator().manual_seed(seed)
    is_whole = n == len(everything)
    settings = {"n_tokens": n, "pick": pick, "seed": seed}
    kept = _Kept(log, {"fingerprint": lm.fingerprint, "cuts": [list(cut) for cut in cuts], **settings})
    tokens = closest_tokens(lm, everything, n, generator) if pick == "near" and not is_whole else everything
    tried: list[list[Margin]] = []  # by prefix, by cut
    exact: list[list[Margin]] = []
    n_all = min(n_exhaustive, len(prefixes))
    steps = _Steps(len(prefixes) * n + (0 if is_whole else n_all * len(everything)), on_step)

    def margins(number: int, prefix: Tensor, among: Tensor) -> list[Margin]:
        known = kept.margins(number, prefix, len(among))
        if known is None:
            known = list(_margins(lm, prefix, among, cuts, steps))
            kept.keep(number, prefix, len(among), known)
        else:
            steps.known(len(among))
        return known

    for number, prefix in enumerate(prefixes):
        if pick == "random" and not is_whole:
            tokens = everything[torch.randperm(len(everything), generator=generator)[:n]]
        tried.append(margins(number, prefix, tokens))
        if number < n_all:
            exact.append(tried[-1] if is_whole else margins(number, prefix, everything))
    return [
        _surveyed(
            cut,
            prefixes,
            n,
            pick=pick,
            is_whole=is_whole,
            tried=[row[i] for row in tried],
            exact=[row[i] for row in exact],
        )
        for i, cut in enumerate(cuts)
    ]


def closest_tokens(lm: LanguageModel, among: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n tokens whose embedding rows lie closest to one another. (N,) → (n,).

    Members of the closest pairs of rows, as they are and scaled to unit norm in turn: the first block sees
    a token through a norm, the residual stream carries its row as it is. Few rows may make up many pairs;
    where the pairs looked at have fewer than n members, the rest are drawn.

    Args:
        lm: the model.
        among: tokens to choose from.
        n: how many.
        generator: of the draws.
    """
    rows = [lm.embeddings.rows(part) for part in among.split(_ROWS)]
    units = [part.float() / part.float().norm(dim=1, keepdim=True).clamp(min=1e-30) for part in rows]
    plain, scaled = (nearest_pairs(blocks, k=_PAIRS * n) for blocks in (rows, units))
    near = [place for both in zip(plain, scaled, strict=True) for pair in both for place in (pair.first, pair.second)]
    drawn = torch.randperm(len(among), generator=generator).tolist()
    return among[list(dict.fromkeys([*near, *drawn]))[:n]]


class _Kept:
    """Margins found before and now; where there is a log, also after an interruption."""

    def __init__(self, path: Path | str | None, settings: dict[str, Any]) -> None:
        self._path = path
        self._log = LineLog(path) if path is not None else None
        self._known: dict[tuple[int, int], dict[str, Any]] = {}  # by number of the prefix and of tokens
        if self._log is None:
            return
        records = self._log.records()
        if not records:
            self._log.append(settings)
        elif records[0] != settings:
            raise MismatchError(
                f"{path} keeps the margins of another model, other layers or other options; repeat those, or name "
                "another file"
            )
        self._known = {(record["prefix"], record["n_tokens"]): record for record in records[1:]}

    def margins(self, number: int, prefix: Tensor, n_tokens: int) -> list[Margin] | None:
        """Return what is known of a prefix."""
        record = self._known.get((number, n_tokens))
        if record is None:
            return None
        if record["input_ids"] != prefix.tolist():
            raise MismatchError(
                f"{self._path} keeps the margins of other prefixes (number {number} is another); name the corpus, "
                "lengths and seed they were drawn with, or another file"
            )
        return [Margin(**{**margin, "tokens": tuple(margin["tokens"])}) for margin in record["margins"]]

    def keep(self, number: int, prefix: Tensor, n_tokens: int, margins: Sequence[Margin]) -> None:
        """Write down what was found."""
        if self._log is not None:
            found = [asdict(margin) for margin in margins]
            ids = prefix.tolist()
            self._log.append({"prefix": number, "input_ids": ids, "n_tokens": n_tokens, "margins": found})


class _Steps:
    """Counts the next tokens run, those that an earlier run left included."""

    def __init__(self, total: int, on_step: Callable[[int, int], None] | None) -> None:
        self._done, self._total = 0.0, total
        self._on_step = on_step

    def known(self, n: int) -> None:
        """Count tokens that need not be run."""
        self._done += n

    def ran(self, n: float) -> None:
        """Count some tokens and tell."""
        if self._on_step is not None:
            self._on_step(round(self._done + n), self._total)
        self._done += n


def _margins(lm: LanguageModel, prefix: Tensor, tokens: Tensor, cuts: Sequence[Cut], steps: _Steps) -> Iterator[Margin]:
    """Yield the margin at each cut; as many cuts in one pass as memory holds the states of."""
    size = max(1, _BYTES // (len(tokens) * lm.d_model * lm.dtype.itemsize))
    groups = [cuts[start : start + size] for start in range(0, len(cuts), size)]
    for group in groups:
        for states in continued_states(lm, prefix, tokens, group, on_part=lambda n: steps.ran(n / len(groups))):
            pair = nearest_pairs([states])[0]
            norm = float(torch.linalg.vector_norm(states.double(), dim=1).mean())
            one, two = tokens[[pair.first, pair.second]].tolist()
            yield Margin(distance=pair.distance, relative_to_norm=pair.distance / norm, tokens=(one, two))


def _surveyed(
    cut: Cut,
    prefixes: Sequence[Tensor],
    n_tokens: int,
    *,
    pick: Pick,
    is_whole: bool,
    tried: Sequence[Margin],
    exact: Sequence[Margin],
) -> MarginSurvey:
    found = torch.tensor([margin.distance for margin in tried], dtype=torch.float64)
    relative = torch.tensor([margin.relative_to_norm for margin in tried], dtype=torch.float64)
    least = int(found.argmin())
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    return MarginSurvey(
        layer=cut[0],
        site=cut[1],
        n_prefixes=len(prefixes),
        n_tokens=n_tokens,
        pick=pick,
        is_whole_vocabulary=is_whole,
        least=float(found[least]),
        mean=float(found.mean()),
        percentiles=tuple(zip(PERCENTILES, found.quantile(shares).tolist(), strict=True)),
        median_relative_to_norm=float(relative.median()),
        least_relative_to_norm=float(relative.min()),
        least_prefix=tuple(prefixes[least].tolist()),
        least_tokens=tried[least].tokens,
        exact=tuple(
            ExactMargin(
                prefix=tuple(prefix.tolist()), bound=bound.distance, distance=margin.distance, tokens=margin.tokens
            )
            for prefix, bound, margin in zip(prefixes, tried, exact, strict=False)  # the first ones
        ),
    )
