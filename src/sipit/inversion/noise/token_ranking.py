"""Which tokens a noisy row may be of: log-likelihoods by the token map, sharpened by what was run at the position.

Rows are compared along directions in which the noise and the map's error are independent of one another. There what
the map misses of the tokens run shows what it will miss of others.
Shapes: B beams, N tokens run, M likely ones, S = width of rows as compared, V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sipit.float64 import as_float64
from sipit.inversion.noise.kernel_errors import kernel_errors, standard_of
from sipit.inversion.noise.token_map import TokenMap

_STRENGTHS = (0.05, 0.5, 5.0)  # of the ridge: behind one prefix errors are alike, unless the model is a random one
_DRAWN = 1.0  # tokens that the offset behind all beams counts as
_PRIOR = 32.0  # tokens that the map's own error counts as beside that of those run
_UNMAPPED = 5e-4  # chance that a token's row is nothing like the map says: pieces of words, tokens taken for sinks


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """Tokens that were run at one position. N of them."""

    token_ids: Tensor  # (N,)
    beams: Tensor  # (N,) behind which each was run
    states: Tensor  # (N, W)
    n_beams: int  # of them all

    def some(self, which: Tensor) -> Shown:
        """Return those of some indices."""
        return replace(
            self,
            token_ids=self.token_ids[which],
            beams=self.beams[which],
            states=self.states[which.to(self.states.device)],
        )

    def and_more(self, others: Shown) -> Shown:
        """Return these and others."""
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, others.token_ids]),
            beams=torch.cat([self.beams, others.beams]),
            states=torch.cat([self.states, others.states]),
        )


class TokenRanking:
    """Log-likelihoods of noisy rows for every token.

    Args:
        mapped: of the cut.
        variances: of the noise on each coordinate: (W,).
    """

    def __init__(self, mapped: TokenMap, variances: Tensor) -> None:
        self._mapped = mapped
        within = as_float64(mapped.within)
        if mapped.projection is not None:  # the projection mixes all coordinates
            variances = variances.mean().expand(len(within))
        by_noise = as_float64(variances.to(within)).rsqrt()
        values, vectors = torch.linalg.eigh(by_noise[:, None] * within * by_noise)
        total = 1 + values.clamp(min=0)  # (S,) variances along the directions, in those of the noise
        whitening = by_noise[:, None] * vectors * total.rsqrt()  # (S, S)
        error = (whitening.T @ as_float64(mapped.error) @ whitening).diagonal()
        self._noise = total.reciprocal().to(mapped.mean)  # (S,) shares of the variance
        self._far = error.to(mapped.mean) + self._noise  # (S,)
        self._whitening = whitening.to(mapped.mean)
        self._density = float(by_noise.log().sum() - 0.5 * total.log().sum())  # of the whitened space
        self._image = mapped.table @ self._whitening  # (V, S)
        self._penalty = 0.5 * self._image.square().sum(dim=1)  # (V,)
        self._far_penalty = 0.5 * self._image.square() @ self._far.reciprocal()  # (V,)
        self._standard = standard_of(mapped.table)

    def at_first(self, row: Tensor) -> Tensor:
        """Return log-likelihoods of a row as compared before anything was run behind its prefix. (S,) → (V,)."""
        left = (row - self._mapped.mean) @ self._whitening  # (S,)
        found = self._image @ (left / self._far) - self._far_penalty
        own = 0.5 * float((left.square() / self._far).sum())
        scores: Tensor = found - own + self._constant(self._far)
        return scores

    def sharpened(self, row: Tensor, shown: Shown, likely: Tensor) -> Tensor:
        """Return log-likelihoods of a row behind each beam, given tokens that were run there.

        Args:
            row: (S,) as compared.
            shown: the tokens run.
            likely: (M,) tokens whose errors are learned from those of the others.

        Returns:
            (B, M)
        """
        errors, offsets = self._errors(shown)  # (N, S), (B, S)
        left = (row - self._mapped.mean) @ self._whitening - offsets  # (B, S)
        errors = errors - offsets[shown.beams.to(offsets.device)]
        return self._learned(left, errors, shown.token_ids, likely.to(left.device))

    def by_map(self, row: Tensor, shown: Shown, weights: Tensor) -> Tensor:
        """As `sharpened`, of all tokens, by the map and the mean offset of beams of some weights. (B,) → (V,)."""
        _, offsets = self._errors(shown)
        left = (row - self._mapped.mean) @ self._whitening - weights.to(offsets) @ offsets  # (S,)
        own = 0.5 * float(left.square().sum())
        scores: Tensor = self._image @ left - self._penalty - own + self._constant(torch.ones_like(self._noise))
        return scores

    def _learned(self, left: Tensor, errors: Tensor, ids: Tensor, likely: Tensor) -> Tensor:
        """Return log-likelihoods of likely tokens, the errors of others taken into account. (B, S), (N, S) → (B, M)."""
        learned = kernel_errors(self._features(ids), errors, strengths=_STRENGTHS)
        usual = 1 - self._noise  # (S,) what the map's own error is
        missed = learned.left_out.square().sum(dim=0) + _PRIOR * usual
        variances = missed / (len(errors) + _PRIOR) + self._noise  # (S,)
        image = self._image[likely] + learned.predicted(self._features(likely))  # (M, S)
        penalty = 0.5 * image.square() @ variances.reciprocal()  # (M,)
        own = 0.5 * (left.square() / variances).sum(dim=1, keepdim=True)
        scores: Tensor = (left / variances) @ image.T - penalty - own + self._constant(variances)
        return scores

    def _features(self, ids: Tensor) -> Tensor:
        """Return by what tokens are compared. (N,) → (N, S)."""
        return self._standard(self._mapped.table[ids.to(self._image.device)])

    def _errors(self, shown: Shown) -> tuple[Tensor, Tensor]:
        """Return the map's errors of tokens run, and their mean behind each beam, drawn towards that behind all.

        (N, S), (B, S)
        """
        errors = self._mapped.errors(shown.states, shown.token_ids) @ self._whitening
        beams = shown.beams.to(errors.device)
        sums = torch.zeros(shown.n_beams, errors.shape[1]).to(errors).index_add_(0, beams, errors)
        counts = torch.bincount(beams, minlength=shown.n_beams)[:, None]
        return errors, (sums + _DRAWN * errors.mean(dim=0)) / (counts + _DRAWN)

    def _constant(self, variances: Tensor) -> float:
        """Return the log-density at the mean, with these variances along the directions. (S,)."""
        return self._density - 0.5 * float((2 * math.pi * variances).log().sum())


def with_unmapped(scores: Tensor) -> Tensor:
    """Return scores in which no token is as unlikely as the map says: its row may be nothing like that. (N, V)."""
    return torch.logaddexp(scores, scores.amax(dim=1, keepdim=True) + math.log(_UNMAPPED))
