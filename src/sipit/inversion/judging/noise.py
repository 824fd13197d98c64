"""How far the same prompt's states lie apart between passes of different shapes: measured, never typed in.

A right token's state differs from the observed one by the order of floating-point sums, which depends
on the shapes the kernels see. The same prompts go through the ordinary forward pass and through packed
passes, on this model, cut, dtype and device; so do single states that amplify rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sipit.errors import ModelError
from sipit.float64 import as_float64
from sipit.inversion.judging.calibration import calibration_prompts
from sipit.models import LanguageModel, PackedRow, TruncatedModel
from sipit.models.kept import kept
from sipit.models.packed_row import in_turn
from sipit.observations import Cut

SAFETY = 8.0  # the tolerance is this many times the largest noise seen in calibration
CLEAR = 0.25  # of the gap to wrong tokens that a tolerance stays below where noise allows
_LOW_GAP = 0.1  # quantile of the gaps that counts: a few tokens of any vocabulary are hardly trained, and alike
_SHAPES = ((1, 0), (2, 15), (1, 1), (8, 3), (1, 2), (1, 63), (16, 0), (5, 0))  # tokens right in a row, wrong beside
_RECIPE = "2"  # raised with what is measured
_WIDTHS = (1, 2, 16, 64)  # of the packed passes that measure the noise of one state


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """Largest distance between packed and ordinary states seen in calibration, over the state's norm."""

    first: float  # at position 0
    rest: float  # at later positions
    first_gap: float  # how near wrong tokens come to the right one's state, over its norm, at position 0
    rest_gap: float  # and at later positions
    block_tokens: int  # what measuring it cost
    first_spread: float = 1.0  # distance of two tokens' states over that of their embedding rows, at position 0
    rest_spread: float = 1.0  # and at later positions


def noise_floor(lm: LanguageModel, cut: Cut, seq_len: int | None = None) -> NoiseFloor:
    """Return the measured noise of the packed check against the ordinary forward pass, once per cut.

    `seq_len` is the length of the pass that is judged, as in `LanguageModel.cut`.

    Raises:
        ModelError: packed states of right tokens are not far nearer than those of wrong ones, so
            the packed check does not compute this model.
    """
    regime = lm.regime(seq_len)

    def made() -> NoiseFloor:
        return kept(
            lm,
            "floors",
            f"{cut} {regime} {_RECIPE}",
            lambda: _measure(lm, lm.cut(cut, seq_len=seq_len)),
            to_json=asdict,
            from_json=lambda record: _known_floor(record, lm.cut(cut, seq_len=seq_len).rounding),
        )

    return lm.derived(("noise floor", cut, regime), made)


def _known_floor(record: Any, rounding: float) -> NoiseFloor | None:
    """Return a floor that was kept, if measuring can have given it."""
    floor = NoiseFloor(**record)
    numbers = [floor.first, floor.rest, floor.first_gap, floor.rest_gap, floor.first_spread, floor.rest_spread]
    is_sane = all(type(each) is float and 0 < each < math.inf for each in numbers) and type(floor.block_tokens) is int
    least, most = rounding, noise_ceiling(rounding)
    is_fair = least <= floor.rest and max(floor.first, floor.rest) <= most and 2 * floor.rest <= floor.rest_gap
    return floor if is_sane and is_fair else None


def _measure(lm: LanguageModel, cut: TruncatedModel) -> NoiseFloor:
    firsts: list[float] = []
    rests: list[float] = []
    first_gaps: list[float] = []
    rest_gaps: list[float] = []
    spreads: dict[bool, list[float]] = {True: [], False: []}  # by whether the position is the first
    spent = 0
    shapes = itertools.cycle(_SHAPES)  # from one prompt to the next, so that each is measured whatever their lengths
    for ids in calibration_prompts(lm):
        expected = as_float64(cut.ordinary(ids))  # (T, D)
        norms = expected.norm(dim=1).cpu()  # (T,)
        try:
            right, wrong, spread, n_packed = _packed_distances(cut, ids, expected, lm, shapes)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(
                f"model {lm.name!r} cannot run many candidates in one row behind a shared prefix ({error}); "
                "this layout is not supported"
            ) from error
        ratios, gaps = (right / norms).tolist(), (wrong / norms).tolist()
        firsts.append(ratios[0])
        rests += ratios[1:]
        first_gaps += [gap for gap in gaps[:1] if gap < math.inf]
        rest_gaps += [gap for gap in gaps[1:] if gap < math.inf]
        for place, value in enumerate(spread.tolist()):
            spreads[place == 0] += [value] if value < math.inf else []
        spent += (len(ids) + n_packed) * cut.layer
    unit = cut.rounding  # one rounding of the norm: less cannot be told from zero
    rest, rest_gap = max(*rests, unit), _quantile(rest_gaps, _LOW_GAP)
    first, first_gap = max(*firsts, unit), min(_quantile(first_gaps, _LOW_GAP), rest_gap)
    floor = NoiseFloor(
        first=max(first, rest) if SAFETY * rest <= CLEAR * first_gap else first,  # few first tokens are measured
        rest=rest,
        first_gap=first_gap,
        rest_gap=rest_gap,
        block_tokens=spent,
        first_spread=_quantile(spreads[True] or spreads[False] or [1.0], _LOW_GAP),
        rest_spread=_quantile(spreads[False] or [1.0], _LOW_GAP),
    )
    typical = _quantile(rests, 0.5)
    if typical > CLEAR * _quantile(rest_gaps, 0.5) or 2 * rest > rest_gap:
        raise ModelError(
            f"model {lm.name!r}: packed and ordinary states after {cut.layer} blocks differ by up to "
            f"{rest:.2g} of their norm, wrong tokens by {rest_gap:.2g} and more; the packed check does not "
            "reproduce this model, or its dtype is too coarse (try dtype float32)"
        )
    most = noise_ceiling(cut.rounding)
    if max(first, rest) > most:
        raise ModelError(
            f"model {lm.name!r}: packed and ordinary states after {cut.layer} blocks differ by up to "
            f"{max(first, rest):.2g} of their norm, which {lm.arithmetic} arithmetic does not explain "
            f"(it explains {most:.2g}), so its states depend on more than the tokens before them: the length "
            "of the pass, the rows beside them, or experts chosen by a last digit; such states cannot be judged "
            "(where experts are the cause, try dtype float32)"
        )
    return floor


def noise_ceiling(rounding: float) -> float:
    """Return the most, over a state's norm, that rounding alone may put two passes of one prompt apart.

    Each rounding is off by half of `rounding`; a forward pass whose result has lost more than half of the
    digits, its square root, is no longer one function that a machine evaluates. Measured noise lies below it
    at each dtype: some 1e-5 of 3.5e-4 in float32, 6 of 8.8 per cent in bfloat16. What lies above it
    has another cause: states that depend on the length of the pass, or on the rows beside them.
    """
    return math.sqrt(rounding)


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))] if values else math.inf


def _packed_distances(
    cut: TruncatedModel, ids: Tensor, expected: Tensor, lm: LanguageModel, shapes: Iterator[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return by packed passes the distances of right tokens, of the nearest wrong ones, and these over their rows'.

    (T,) each, infinite where no wrong token was run.

    The passes take every shape in turn that a search may use: kernels differ by the number of rows.
    """
    row = cut.row()
    right, wrong, spread, n_packed, start = [], [], [], 0, 0
    while start < len(ids):
        n_chain, n_decoys = next(shapes)
        chain = ids[start : start + n_chain]
        alike = [int(ids[start]), *lm.embeddings.twins(int(ids[start]))]  # no check tells these apart
        decoys = (ids[start] + torch.arange(1, n_decoys + 1)) % lm.vocab_size
        decoys = decoys[~torch.isin(decoys, torch.tensor(alike))]
        tokens = torch.cat([chain, decoys])  # (Q,)
        places = torch.cat([torch.arange(start, start + len(chain)), torch.full((len(decoys),), start)])
        attends = torch.eye(len(tokens), dtype=torch.bool)
        attends[: len(chain), : len(chain)] = in_turn(len(chain))
        states = as_float64(row.run(tokens, places, attends))  # (Q, D)
        distances = (states - expected[places.to(states.device)]).norm(dim=1).cpu()
        right.append(distances[: len(chain)])
        nearest = torch.full((len(chain),), torch.inf, dtype=torch.float64)
        ratios = nearest.clone()
        if len(decoys):
            nearest[0] = distances[len(chain) :].min()
            rows = lm.embeddings.rows(torch.cat([chain[:1], decoys])).cpu().double()
            apart = (rows[1:] - rows[0]).norm(dim=1).clamp(min=1e-30)
            ratios[0] = (distances[len(chain) :] / apart).min()
        wrong.append(nearest)
        spread.append(ratios)
        row.keep(range(len(chain)))
        start += len(chain)
        n_packed += len(tokens)
    return torch.cat(right), torch.cat(wrong), torch.cat(spread), n_packed


def local_noise(
    cut: TruncatedModel, prefix: Tensor, token_id: int, *, seq_len: int, row: PackedRow | None = None, lane: int = 0
) -> tuple[float, int]:
    """Return how far kernels of different shapes put one token's state apart, and the tokens that took.

    Some states amplify rounding far beyond the noise floor: a later token that attention uses as a
    sink, for one. The state behind `prefix` is computed by packed passes of several widths and by an
    ordinary pass as long as the observed one. Nothing here looks at the observed state, and what no
    rounding explains is not booked as noise: see `noise_ceiling`.

    Args:
        cut: the model cut where the state was observed.
        prefix: token ids before the token in question. (P,)
        token_id: that token.
        seq_len: length of the observed prompt, more than P.
        row: holds the prefix, and nothing behind it that is still to be kept; None: made here.
        lane: of the prefix in the row.
    """
    spent = 0
    if row is None:
        row, spent = cut.row(prefix), len(prefix)
    token = torch.tensor([token_id])
    ids = torch.cat([prefix.cpu(), token.repeat(seq_len - len(prefix))])  # what follows changes no state before it
    state = cut.ordinary(ids)[len(prefix)]  # (D,)
    expected = as_float64(state)
    largest = cut.rounding * float(expected.norm())  # one rounding of it: less is luck
    most = noise_ceiling(cut.rounding) * float(expected.norm())
    for width in _WIDTHS:
        tokens = token.repeat(width)
        states = row.run(tokens, torch.full((width,), len(prefix)), lanes=torch.full((width,), lane))
        largest = max(largest, float((as_float64(states[0]) - expected).norm()))
        spent += width
    return min(largest, most), spent + seq_len
