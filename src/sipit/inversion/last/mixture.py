"""A whole prompt from its last token's state behind the first block, where that state is a mixture of its tokens.

Before the first attention a token's key and value depend on the token alone. So what each head gives is the mean of
the values of the prompt's tokens, weighted by exponentials of scores that are known for every token at every
distance from the last one. First what the heads gave is solved from the state; then the tokens are sought whose
weighted mean that is: tokens are added one by one, in any order of distances, each beam judged by how little of the
heads' deviation from the mean value is left. Everything here proposes; nothing is accepted on its word.

H query heads, K key heads, R = H / K that share one, d width of a key, e of a value, D = d_model, V = vocab_size,
B beams, N tokens that are tried, L longest distance from the last token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sipit.inversion.fitting.prompts import few_windows
from sipit.inversion.inverses.whitening import whitening
from sipit.inversion.last.decode import Prompt
from sipit.models import LanguageModel
from sipit.models.open_block import OpenBlock, open_block

_PROMPTS, _TOKENS = 1536, 12  # run to see what heads give
_VALUES = 8192  # drawn to see how they spread
_RIDGE = 1e-5  # of the mean diagonal
_FLOOR = 1e-3  # of the mean eigenvalue of values, added to each
_COARSEST = (1e-1, 1e-2)  # of the state's norm: blur of the first step, and where that leads nowhere
_SOLVED = 300.0  # squared standard deviations of blur left of a coordinate, on average
_PLAUSIBLE, _HOPELESS = 16.0, 60.0  # squared standard deviations that a regression misses heads by, on average
_DAMPING, _MOST_DAMPING = 1e-6, 1e3  # of a step that leads away, at first, and where none leads on
_LEAST_LEFT = 1e-7  # of a head's squared deviation: what float32 leaves
_TEMPERED = 0.3  # share of the log-likelihood that counts: values are not normal, and their coordinates not independent
_YIELDED = 32  # prompts after each token, those first that leave least
_REFINED, _CHANGES = 3, 4  # prompts whose tokens are changed, and the best changes in each place that are looked at
_BETTER = 0.999  # of what is left: more than that is no change for the better
_MOST_GAIN = 60.0  # logarithm of a weight over the last token's
_KEPT = 4096  # tokens tried after the first step, and twice as many after it
_CELLS = 1 << 20  # scores computed at once


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What one model's first attention brings together, prepared once."""

    block: OpenBlock
    keys: Tensor  # (V, K, d)
    white: Tensor  # (K, V, e) values less their mean, whitened
    mean: Tensor  # (K, e)
    whitener: Tensor  # (K, e, e)
    log_frequencies: Tensor  # (V,)
    to_heads: Tensor  # (2 D + 1, H e) from a state and the last token's embedding to what the heads gave, float64
    spread: Tensor  # (H e, H e) along which that misses, by one standard deviation, float64


def mixture_of(lm: LanguageModel) -> Mixture | None:
    """Return the mixture of a model, made once; None where its first block is none that can be solved."""
    return lm.derived("first mixture", lambda: _mixture(lm))


@torch.no_grad()
def _mixture(lm: LanguageModel) -> Mixture | None:
    block = open_block(lm)
    if block is None:
        return None
    windows, generator = few_windows(lm, _TOKENS), torch.Generator().manual_seed(2)
    prompts = windows.draw(_PROMPTS, generator).to(lm.device)
    given, states = (torch.cat(parts) for parts in zip(*(block.mixtures(p) for p in prompts.split(128)), strict=True))
    given = given[:, 1:].flatten(0, 1).flatten(1).to(block.solving_device).double()  # (N, H e)
    if given.shape[1] > lm.d_model:
        return None  # more numbers than the state has
    rows = lm.embeddings.rows(prompts[:, 1:].flatten()).to(given)
    inputs = _inputs(states[:, 1:].flatten(0, 1).to(given), rows)
    gram = inputs.T @ inputs
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    to_heads = torch.linalg.solve(gram, inputs.T @ given)
    missed = given - inputs @ to_heads
    values, vectors = torch.linalg.eigh(missed.T @ missed / len(missed))
    tokens = block.read(torch.arange(lm.vocab_size))
    frequencies = windows.frequencies()
    drawn = torch.multinomial(frequencies, _VALUES, replacement=True, generator=generator)
    seen = tokens.values[drawn.to(lm.device)].float()  # (N, K, e)
    mean = seen.mean(dim=0)
    gaps = (seen - mean).transpose(0, 1).cpu().double()  # (K, N, e)
    whitener = torch.stack([whitening(part.T @ part / len(part), _FLOOR) for part in gaps]).to(mean)
    return Mixture(
        block=block,
        keys=tokens.keys.float(),
        white=(tokens.values.float() - mean).transpose(0, 1) @ whitener,
        mean=mean,
        whitener=whitener,
        log_frequencies=frequencies.log().to(lm.device),
        to_heads=to_heads,
        spread=vectors * (values.clamp(min=0) + _FLOOR * values.mean()).sqrt(),
    )


def _inputs(states: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([states, rows, torch.ones_like(states[:, :1])], dim=1)  # (N, 2 D + 1)


def heads_of(lm: LanguageModel, mixture: Mixture, last: int, state: Tensor, blur: Tensor) -> Tensor | None:
    """Solve for what the heads gave: the likeliest that leads to the state, in float64.

    The state is taken for a blurred one at first, so that what is known of such heads holds the solution where heads
    are; then the blur is taken away step by step. Another last token than the prompt's leads away from there.

    Args:
        lm: the model.
        mixture: of it.
        last: token id that the prompt ends in.
        state: (D,)
        blur: (D,) by how much arithmetic and rounding may have moved each coordinate of it, one standard deviation.

    Returns:
        (H, e) float32; None where nothing like heads leads to the state.
    """
    spread, width = mixture.spread, mixture.white.shape[2]
    sought, blur = state.to(spread), blur.to(spread)
    row = lm.embeddings.rows(torch.tensor([last])).to(spread)
    guess = (_inputs(sought[None], row) @ mixture.to_heads)[0]  # (H e,)
    identity = torch.eye(len(spread)).to(spread)

    def states(flat: Tensor) -> Tensor:
        return mixture.block.finish(last, flat.unflatten(1, (-1, width)))

    def missed(steps: Tensor) -> Tensor:
        return states((guess + spread @ steps)[None])[0].detach() - sought

    for coarsest in _COARSEST:
        steps = torch.zeros(len(spread)).to(spread)
        left = missed(steps)
        for level in _levels(coarsest * float(sought.norm()) / len(sought) ** 0.5, blur):
            scale = blur.clamp(min=level)
            before = float((left / scale).square().sum() + steps.square().sum())
            slopes = _slopes(states, guess + spread @ steps) @ spread / scale[:, None]  # (D, H e)
            normal, slope = slopes.T @ slopes + identity, slopes.T @ (left / scale) + steps
            damping = 0.0
            while damping < _MOST_DAMPING:
                ridge = damping * float(normal.diagonal().mean())
                longer = steps - torch.linalg.solve(normal + ridge * identity, slope)
                after = missed(longer)
                if float((after / scale).square().sum() + longer.square().sum()) < before:
                    steps, left = longer, after
                    break
                damping = 10 * damping or _DAMPING
            if float(steps.square().mean()) > _HOPELESS:
                break
        if float((left / blur).square().mean()) <= _SOLVED and float(steps.square().mean()) <= _PLAUSIBLE:
            heads: Tensor = (guess + spread @ steps).float().unflatten(0, (-1, width)).to(lm.device)
            return heads
    return None


def _levels(coarsest: float, blur: Tensor) -> list[float]:
    """Return the blur of each step: ten times less each time until it is as little as it is, and that twice."""
    n_decades = max(0, int(math.log10(coarsest / float(blur.min().clamp(min=1e-30)))))
    return [*(coarsest * 10.0**-n for n in range(1 + n_decades)), 0.0, 0.0]


def _slopes(states: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """Return the Jacobian of the state in what the heads gave: a copy a row, so that one backward pass gives all."""
    with torch.enable_grad():
        copies = given.repeat(states(given[None]).shape[1], 1).requires_grad_(True)  # (D, H e)
        (slopes,) = torch.autograd.grad(states(copies).diagonal().sum(), copies)
    return slopes


@dataclass(frozen=True, kw_only=True)
class _Beams:
    """Prompts in the making: which tokens stand at which distance from the last one."""

    tokens: Tensor  # (B, L) token at distance 1 to L, -1 where none is yet
    sums: Tensor  # (B, H, e) of their whitened values and the last token's, each times its weight
    weights: Tensor  # (B, H) sums of these, the last token's being 1
    prior: Tensor  # (B,) log-frequencies

    def taken(self, which: Tensor) -> _Beams:
        """Return some of them. (B',)."""
        return _Beams(
            tokens=self.tokens[which], sums=self.sums[which], weights=self.weights[which], prior=self.prior[which]
        )


@torch.no_grad()
def decoded(mixture: Mixture, last: int, heads: Tensor, lengths: range, *, n_beams: int) -> Iterator[list[Prompt]]:
    """Yield prompts whose weighted mean comes near to what the heads gave, after each token those that are whole.

    Those that come nearest are changed one token at a time at last, every token tried in every place.

    Args:
        mixture: of the model.
        last: token id that the prompts end in.
        heads: (H, e) what its heads gave.
        lengths: of prompts that are sought.
        n_beams: B.
    """
    sought = _Sought.of(mixture, last, heads, lengths)
    n_shared = len(heads) // len(mixture.white)  # R
    beams = _Beams(
        tokens=torch.full((1, sought.n_places), -1, device=heads.device),
        sums=mixture.white[:, last].repeat_interleave(n_shared, dim=0)[None],
        weights=torch.ones(1, len(heads), device=heads.device),
        prior=torch.zeros(1, device=heads.device),
    )
    tried = torch.arange(mixture.white.shape[1], device=heads.device)
    nearest: list[tuple[float, _Beams]] = []
    for n_placed in range(1, sought.n_places + 1):
        found = _scored(mixture, sought, beams, tried)  # (B, N, L)
        best_of_token = found.amax(dim=(0, 2))
        top = found.flatten().topk(min(2 * n_placed * n_beams, found.numel()))  # a set of tokens comes n_placed times
        beams = _grown(mixture, sought, beams, tried=tried, top=top, n_beams=n_beams)
        n_kept = _KEPT * (2 if n_placed == 1 else 1)
        tried = tried[best_of_token.topk(min(n_kept, len(tried))).indices]
        is_whole = (beams.tokens[:, :n_placed] >= 0).all(dim=1) & (n_placed + 1 in lengths)
        whole = is_whole.nonzero()[:, 0]
        if len(whole):
            left = _left(sought, beams)[whole]
            order = left.argsort()[:_YIELDED]
            yield [_prompt(beams, int(which), last) for which in whole[order]]
            nearest += [(float(left[i]), beams.taken(whole[i][None])) for i in order[:_REFINED]]
    for _, one in sorted(nearest, key=lambda pair: pair[0])[:_REFINED]:
        yield from _refined(mixture, sought, one, last)


@dataclass(frozen=True, kw_only=True)
class _Sought:
    """What is sought for one state, and what each token at each distance would bring to it."""

    white: Tensor  # (H, e) the heads' deviations from the mean value, whitened
    gains: Tensor  # (L, H, V) weights at distance 1 to L, the last token's being 1

    @staticmethod
    def of(mixture: Mixture, last: int, heads: Tensor, lengths: range) -> _Sought:
        """Prepare what is sought behind one last token."""
        gaps = heads.unflatten(0, (len(mixture.white), -1)) - mixture.mean[:, None]  # (K, R, e)
        scores = mixture.block.scores(last, lengths[-1], mixture.keys)  # (L + 1, H, V)
        gains = (scores[1:] - scores[0, :, last, None]).clamp(max=_MOST_GAIN).exp()
        return _Sought(white=(gaps @ mixture.whitener).flatten(0, 1), gains=gains)

    @property
    def n_places(self) -> int:
        """L."""
        return len(self.gains)

    def only(self, place: int) -> _Sought:
        """Return the same with one distance alone."""
        return _Sought(white=self.white, gains=self.gains[place : place + 1])


def _prompt(beams: _Beams, which: int, last: int) -> Prompt:
    tokens = beams.tokens[which]
    return (*tokens[tokens >= 0].flip(0).tolist(), last)


def _left(sought: _Sought, beams: _Beams) -> Tensor:
    """Return the share of the heads' deviation that whole prompts leave. (B,)."""
    gaps = sought.white - beams.sums / beams.weights[..., None]
    left: Tensor = torch.linalg.vector_norm(gaps.flatten(1), dim=1) / sought.white.norm()
    return left


def _refined(mixture: Mixture, sought: _Sought, one: _Beams, last: int) -> Iterator[list[Prompt]]:
    """Change one token of a prompt after the other to what leaves least, as long as that leaves less."""
    n_shared = sought.white.shape[0] // len(mixture.white)
    everything = torch.arange(mixture.white.shape[1], device=sought.white.device)
    least = float(_left(sought, one))
    while True:
        changed = []
        for place in range(int((one.tokens >= 0).sum())):
            token = int(one.tokens[0, place])
            gain = sought.gains[place, :, token]  # (H,)
            values = mixture.white[:, token].repeat_interleave(n_shared, dim=0)  # (H, e)
            without = _Beams(
                tokens=one.tokens.new_full((1, 1), -1),
                sums=one.sums - gain[:, None] * values,
                weights=one.weights - gain,
                prior=one.prior - mixture.log_frequencies[token],
            )
            only = sought.only(place)
            top = _scored(mixture, only, without, everything).flatten().topk(_CHANGES)
            grown = _grown(mixture, only, without, tried=everything, top=top, n_beams=_CHANGES)
            tokens = one.tokens.repeat(len(grown.prior), 1)
            tokens[:, place] = grown.tokens[:, 0]
            changed.append(replace(grown, tokens=tokens))
        both = _Beams(**{f.name: torch.cat([getattr(each, f.name) for each in changed]) for f in fields(_Beams)})
        left = _left(sought, both)
        order = left.argsort()[:_YIELDED]
        yield [_prompt(both, int(which), last) for which in order]
        if float(left[order[0]]) >= least * _BETTER:
            return
        one, least = both.taken(order[:1]), float(left[order[0]])


def _grown(mixture: Mixture, sought: _Sought, beams: _Beams, *, tried: Tensor, top: Any, n_beams: int) -> _Beams:
    """Return the beams that the best scores lead to, each set of placed tokens once."""
    n_places = sought.n_places
    is_possible = torch.isfinite(top.values)
    flat = top.indices[is_possible]
    places = flat % n_places
    tokens = tried[flat // n_places % len(tried)]
    parents = flat // (n_places * len(tried))
    placed = beams.tokens[parents].clone()
    placed[torch.arange(len(placed)), places] = tokens
    first = list({row: number for number, row in reversed(list(enumerate(map(tuple, placed.tolist()))))}.values())
    kept = torch.tensor(sorted(first)[:n_beams], device=placed.device)
    parents, places, tokens = parents[kept], places[kept], tokens[kept]
    gain = sought.gains[places, :, tokens]  # (B, H)
    n_shared = gain.shape[1] // len(mixture.white)
    values = mixture.white[:, tokens].transpose(0, 1).repeat_interleave(n_shared, dim=1)  # (B, H, e)
    chosen = beams.taken(parents)
    return _Beams(
        tokens=placed[kept],
        sums=chosen.sums + gain[..., None] * values,
        weights=chosen.weights + gain,
        prior=chosen.prior + mixture.log_frequencies[tokens],
    )


def _scored(mixture: Mixture, sought: _Sought, beams: _Beams, tried: Tensor) -> Tensor:
    """Return how much speaks for each beam with each token added at each distance. (B, N, L)."""
    n_at_once = max(1, _CELLS // (sought.n_places * max(1, len(beams.prior))))
    parts = [_part(mixture, sought, beams, part) for part in tried.split(n_at_once)]
    likelihoods = torch.cat(parts, dim=1)
    prior = beams.prior[:, None] + mixture.log_frequencies[tried]  # (B, N)
    found = _TEMPERED * likelihoods + prior[..., None]
    return found.masked_fill_((beams.tokens >= 0)[:, None], -torch.inf)


def _part(mixture: Mixture, sought: _Sought, beams: _Beams, tokens: Tensor) -> Tensor:
    """Return log-likelihoods up to a constant: heads that share values differ by what the tokens not yet placed bring.

    Each head's deviation is fitted by the placed tokens' with a factor of its own, for the sum of all weights is not
    known yet; what is left is normal, its covariance between the heads unknown. (B, N, L).
    """
    white, gains = sought.white, sought.gains[:, :, tokens]
    n_shared, width = len(white) // len(mixture.white), white.shape[1]
    total = white.new_zeros(())
    for group, table in enumerate(mixture.white):
        heads = slice(group * n_shared, (group + 1) * n_shared)
        total = total - 0.5 * width * _log_left(
            table[tokens], white[heads], beams.sums[:, heads], beams.weights[:, heads], gains[:, heads]
        )
    return total


def _log_left(y: Tensor, x: Tensor, sums: Tensor, weights: Tensor, gains: Tensor) -> Tensor:
    """Return the log-determinant of what is left of heads that share values, over their sizes.

    (N, e) values, (R, e) deviations, (B, R, e) sums, (B, R) weights, (L, R, N) gains → (B, N, L)
    """
    yx, ys = y @ x.T, torch.einsum("ne,bre->bnr", y, sums)  # (N, R), (B, N, R)
    yy, sx, ss = y.square().sum(dim=1)[:, None], sums @ x.T, sums @ sums.transpose(1, 2)
    heads = range(len(x))
    gain = [gains[:, head].T for head in heads]  # (N, L) each
    size = x.norm(dim=1).clamp(min=1e-30).tolist()
    with_x = [[sx[:, i, j, None, None] + gain[i] * yx[:, j, None] for j in heads] for i in heads]
    with_sum: dict[tuple[int, int], Tensor] = {}
    for i in heads:
        for j in range(i + 1):
            mixed = gain[i] * ys[:, :, j, None] + gain[j] * ys[:, :, i, None] + gain[i] * gain[j] * yy
            with_sum[i, j] = ss[:, i, j, None, None] + mixed
    factors = []
    for i in heads:
        most = 1 / (weights[:, i, None, None] + gain[i])  # where the placed tokens are all there are
        factors.append(torch.minimum((with_x[i][i] / with_sum[i, i]).clamp(min=0), most))
    left: dict[tuple[int, int], Tensor] = {}
    for i, j in with_sum:
        products = factors[i] * with_x[i][j] + factors[j] * with_x[j][i]
        left[i, j] = (x[i] @ x[j] - products + factors[i] * factors[j] * with_sum[i, j]) / (size[i] * size[j])
    return _log_determinant(left, len(x))


def _log_determinant(entries: dict[tuple[int, int], Tensor], size: int) -> Tensor:
    """Return the log-determinant of many symmetric matrices, by Cholesky, pivots never below what arithmetic leaves."""
    rows: dict[tuple[int, int], Tensor] = {}
    logs: Tensor | float = 0.0
    for i in range(size):
        for j in range(i + 1):
            value = entries[i, j]
            for k in range(j):
                value = value - rows[i, k] * rows[j, k]
            if i == j:
                value = value.clamp(min=_LEAST_LEFT)
                logs = logs + value.log()
                rows[i, i] = value.sqrt()
            else:
                rows[i, j] = value / rows[j, j]
    return torch.as_tensor(logs)
