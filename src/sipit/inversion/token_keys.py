"""Every token as a direction: the whitened rows of the embedding, without a second table.

score(q, v) = q · W(e_v - m) / ‖W(e_v - m)‖. The matrix W is applied to the query instead of the
rows, so that only a mean and a norm per token are held beside the model's own weights.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from sipit.models import LanguageModel

_FLOOR = 1e-3  # eigenvalues below this fraction of the largest are held there: they are noise


class TokenKeys:
    """Unit keys of all tokens of a model. D = width of the embedding, V = vocab_size."""

    def __init__(self, lm: LanguageModel) -> None:
        self._rows = lm.embeddings
        mean, second, count = torch.tensor(0.0), torch.tensor(0.0), 0
        for _, rows in self._rows.slices():
            wide = rows.double()
            mean, second = mean + wide.sum(dim=0).cpu(), second + (wide.T @ wide).cpu()
            count += len(rows)
        mean = mean / count  # (D,)
        values, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
        values = (values + _FLOOR * values[-1]).clamp(min=1e-30)
        device = lm.device
        self._mean = mean.float().to(device)
        self.whitening = ((vectors * values.rsqrt()) @ vectors.T).float().to(device)  # (D, D), symmetric
        norms = [((rows.float() - self._mean) @ self.whitening).norm(dim=1) for _, rows in self._rows.slices()]
        self._inverse_norms = 1 / torch.cat(norms).clamp(min=1e-6)  # (V,)

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

    def scores(self, queries: Tensor) -> Tensor:
        """Return the inner product of each query with every key. (N, D) → (N, V)."""
        vectors = queries @ self.whitening
        shift = vectors @ self._mean  # (N,)
        return self._rows.products(vectors).sub_(shift[:, None]).mul_(self._inverse_norms)


_made: weakref.WeakKeyDictionary[LanguageModel, TokenKeys] = weakref.WeakKeyDictionary()


def token_keys(lm: LanguageModel) -> TokenKeys:
    """Return the keys of a model, made once."""
    if lm not in _made:
        _made[lm] = TokenKeys(lm)
    return _made[lm]
