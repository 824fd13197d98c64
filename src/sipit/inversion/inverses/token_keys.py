"""Every token as a direction: the whitened rows of the embedding.

score(q, v) = q · W(e_v - m) / ‖W(e_v - m)‖. The matrix W is applied to the query instead of the
rows, so that only a mean and a norm per token are held beside the model's own weights; where the
machine is fast in bfloat16 or in 8-bit integers, a table of the keys in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sipit.inversion.inverses.arithmetic import Int8Matrix, in_int8, is_fast_in_bfloat16, is_fast_in_int8
from sipit.inversion.inverses.top import top_of_rows
from sipit.models import LanguageModel, PrepackedMatrix

_NEIGHBOURS = 64  # of a token, remembered
_FOUND_AT_ONCE = 64  # tokens whose neighbours are
_REFINED = 8  # best tokens of a row whose scores are computed again in float32
_SAMPLED = 16_384  # rows, evenly spread, that mean and covariance are taken of
_FLOOR = 1e-3  # eigenvalues below this fraction of the largest are held there: they are noise


class TokenKeys:
    """Unit keys of all tokens of a model. D = width of the embedding, V = vocab_size."""

    def __init__(self, lm: LanguageModel) -> None:
        self._rows = lm.embeddings
        device = lm.device
        n_sampled = min(self.vocab_size, _SAMPLED)
        sample = self._rows.rows(torch.arange(n_sampled) * self.vocab_size // n_sampled).float()
        self._mean = sample.mean(dim=0)  # (D,)
        sample -= self._mean
        values, vectors = torch.linalg.eigh((sample.T @ sample / n_sampled).cpu().double())
        values = (values + _FLOOR * values[-1]).clamp(min=1e-30)
        self.whitening = ((vectors * values.rsqrt()) @ vectors.T).float().to(device)  # (D, D), symmetric
        self._nearest: dict[int, list[tuple[int, float]]] = {}  # token → its neighbours, as they were asked for
        self._rounded: PrepackedMatrix | Int8Matrix | None = None  # all keys in arithmetic that is fast. (V, D)
        is_fast, is_fast_int8 = is_fast_in_bfloat16(device), is_fast_in_int8(device)
        whitened = PrepackedMatrix(self.whitening.bfloat16() if is_fast else self.whitening)
        norms: list[Tensor] = []
        in_bfloat16: list[Tensor] = []
        parts: list[tuple[Tensor, Tensor]] = []
        for _, rows in self._rows.slices():
            directions = whitened.product(rows.float() - self._mean)
            norms.append(directions.float().norm(dim=1).clamp(min=1e-6))
            if is_fast:
                in_bfloat16.append((directions / norms[-1][:, None]).bfloat16())
            elif is_fast_int8:
                parts.append(in_int8(directions / norms[-1][:, None]))
        self._inverse_norms = 1 / torch.cat(norms)  # (V,)
        if in_bfloat16:
            self._rounded = PrepackedMatrix(torch.cat(in_bfloat16))
        elif parts:
            self._rounded = Int8Matrix(parts)

    @property
    def width(self) -> int:
        """Width of a key."""
        return int(self.whitening.shape[0])

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._rows.vocab_size

    def keys(self, token_ids: Tensor) -> Tensor:
        """Return the unit keys of some tokens. (N,) → (N, D)."""
        rows = (self._rows.rows(token_ids).float() - self._mean) @ self.whitening
        keys: Tensor = rows * self._inverse_norms[token_ids.to(rows.device)][:, None]
        return keys

    def nearest(self, token_id: int, n: int, least: float) -> list[int]:
        """Return up to n other tokens whose keys have at least this cosine with a token's, the nearest first."""
        self.remember([token_id])
        return [i for i, score in self._nearest[token_id][:n] if score >= least]

    def remember(self, token_ids: Sequence[int]) -> None:
        """Find the neighbours of tokens in one go, which costs little more than those of one."""
        new = torch.tensor([token_id for token_id in dict.fromkeys(token_ids) if token_id not in self._nearest])
        for part in new.split(_FOUND_AT_ONCE) if len(new) else ():
            scores = self.scores(self.keys(part)).cpu()  # (N, V)
            scores[torch.arange(len(part)), part] = -torch.inf
            best, columns = top_of_rows(scores, min(_NEIGHBOURS, scores.shape[1]))
            for token_id, ids, values in zip(part.tolist(), columns.tolist(), best.tolist(), strict=True):
                self._nearest[token_id] = list(zip(ids, values, strict=True))

    def scores(self, queries: Tensor) -> Tensor:
        """Return the inner product of each query with every key. (N, D) → (N, V).

        In bfloat16 or 8-bit integers where those are fast; then the best of each row are computed again in float32.
        """
        if self._rounded is not None:
            return self._fast_scores(queries, self._rounded)
        vectors = queries @ self.whitening
        shift = vectors @ self._mean  # (N,)
        return self._rows.products(vectors).sub_(shift[:, None]).mul_(self._inverse_norms)

    def _fast_scores(self, queries: Tensor, rounded: PrepackedMatrix | Int8Matrix) -> Tensor:
        scores = rounded.product(queries).float()  # (N, V)
        _, best = top_of_rows(scores, min(_REFINED, self.vocab_size))  # (N, K)
        keys = self.keys(best.flatten()).view(*best.shape, -1)  # (N, K, D)
        return scores.scatter_(1, best, torch.einsum("nd,nkd->nk", queries, keys))


def token_keys(lm: LanguageModel) -> TokenKeys:
    """Return the keys of a model, made once."""
    return lm.derived("token keys", lambda: TokenKeys(lm))
