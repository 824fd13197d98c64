"""The paper's gradient policy, kept as published: the reference others are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from sipit.inversion.judging.check import Checked
from sipit.inversion.proposals.proposal import Draft, SearchView

_STEP = 1.0  # γ
_CLIP = 1.0  # largest gradient norm
_RESET = 50  # tries between moves of the proxy onto a vocabulary row


class Gradient:
    """Descend ½‖F(e; π, t) − ĥ_t‖² over a proxy embedding e; try the untried token nearest to e.

    One token is tried for each gradient step; every 50 tries the proxy is set to the nearest untried
    row. Each step costs a forward and a backward pass of one token, counted as three. Every untried
    token is reached in the end. Source: arXiv 2510.15511, Alg. 3.
    """

    batch_limit: int | None = 1

    def __init__(self, view: SearchView) -> None:
        self.view = view
        self._proxy = torch.empty(0)  # (D,)
        self._n_tries = 0

    def begin(self) -> None:
        view = self.view
        start = torch.randint(view.lm.vocab_size, (1,), generator=view.generator)
        self._proxy = view.lm.embeddings.rows(start)[0].clone()
        self._n_tries = 0

    def next(self, n: int, untried: Tensor) -> Tensor:
        if self._n_tries and self._n_tries % _RESET == 0:
            self._proxy = self.view.lm.embeddings.rows(self._nearest(untried))[0].clone()
        gradient = self._gradient()
        norm = float(gradient.norm())
        self._proxy = self._proxy - _STEP * gradient * min(1.0, _CLIP / max(norm, 1e-12))
        self._n_tries += 1
        return self._nearest(untried)

    def draft(self) -> Draft | None:
        return None

    def guesses(self, position: int, n: int) -> Tensor:
        return torch.empty(0, dtype=torch.long)

    def learn(self, checked: Checked) -> None:
        """Nothing: the gradient is taken at the proxy, not at what was checked."""

    def overhear(self, position: int, checked: Checked) -> None:
        """Nothing: nothing was checked ahead."""

    def settle(self, token_id: int) -> None:
        """Nothing: the proxy starts afresh at each position."""

    def _nearest(self, untried: Tensor) -> Tensor:
        squared = self.view.lm.embeddings.squared_distances(self._proxy).cpu()  # (V,)
        return squared.masked_fill(~untried, float("inf")).argmin()[None]

    def _gradient(self) -> Tensor:
        view = self.view
        check = view.check
        with torch.enable_grad():
            proxy = self._proxy.detach().requires_grad_()
            place = torch.tensor([view.position])
            state = check.row.run_embeddings(proxy[None], place, lanes=check.lanes(1))[0]  # (D,)
            loss = 0.5 * (state.to(view.target.dtype) - view.target).square().sum()
            (gradient,) = torch.autograd.grad(loss, proxy)
        view.meter.spend(1, check.cut.layer, passes=3)
        return gradient
