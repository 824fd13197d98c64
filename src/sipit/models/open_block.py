"""The first block of a causal LM, opened at its attention.

Before the first attention a token's key and value depend on the token alone, so what the attention gives is a
weighted mean of values from a table. `OpenBlock` hands out that table, and runs what comes behind the attention.

H query heads, K key heads (K divides H), d width of a query or key, e of a value, D = d_model, V = vocab_size.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sipit.models.attention import with_attention
from sipit.models.shallow import clone
from sipit.observations import Cut

if TYPE_CHECKING:
    from sipit.models.language_model import LanguageModel

_Answer = Callable[..., Tensor]  # takes what an attention of transformers takes, gives (B, Q, H, e)

_NAME = "sipit-open"
_UNUSUAL = ("position_bias", "softcap", "s_aux")  # of an attention that is no mean weighted by a softmax of products
_ALIKE = 1e-3  # of the state's norm, between the ordinary pass and the mean written out, in float32
_CHECKED_TOKENS = 12  # of the prompt by which the block is checked
_SLICE = 4096  # tokens whose keys are read at once


@dataclass(frozen=True, kw_only=True)
class HeadsOfTokens:
    """What enters the first attention from some tokens, each at a position of its own."""

    queries: Tensor  # (N, H, d), so scaled that a product with a key is a score
    keys: Tensor  # (N, K, d)
    values: Tensor  # (N, K, e)


class OpenBlock:
    """The first block of a model whose positions are relative: rotary, or none.

    Args:
        lm: the model; not modified.
    """

    def __init__(self, lm: LanguageModel) -> None:
        first = cast(nn.ModuleList, getattr(lm.trunk, lm.family.blocks))[0]
        self._lm = lm
        self._open = _opened(lm, first)
        # What decides nothing but must be solved to many digits is solved in float64, where that exists.
        self.solving_device = torch.device("cpu") if lm.device.type == "mps" else lm.device
        self._wide = _opened(lm, copy.deepcopy(first).to(self.solving_device, torch.float64))

    @torch.no_grad()
    def read(self, token_ids: Tensor, position: int = 0) -> HeadsOfTokens:
        """Return queries, keys and values of tokens that all stand at one position. (N,)."""
        parts = [self._read(ids, position) for ids in token_ids.to(self._lm.device).split(_SLICE)]
        return HeadsOfTokens(
            queries=torch.cat([part.queries for part in parts]),
            keys=torch.cat([part.keys for part in parts]),
            values=torch.cat([part.values for part in parts]),
        )

    def finish(self, token_id: int, heads: Tensor) -> Tensor:
        """Return the states behind the block of one token, given what its attention gave; in float64, differentiable.

        (B, H, e) → (B, D)
        """
        row = self._lm.embeddings.rows(torch.tensor([token_id])).to(self.solving_device, torch.float64)  # (1, D)
        with _answered_by(lambda *_, **__: heads[:, None]):
            return cast(Tensor, self._wide(inputs_embeds=row.expand(len(heads), 1, -1), use_cache=False)[0])[:, 0]

    @torch.no_grad()
    def mixtures(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the attention gives at every position of some prompts, and the states behind the block.

        (B, T) → (B, T, H, e), (B, T, D), float32
        """
        kept: list[Tensor] = []
        with _answered_by(_recorder(kept)):
            states = self._open(input_ids=input_ids.to(self._lm.device), use_cache=False)[0]
        return kept[0].float(), states.float()

    def scores(self, last: int, length: int, keys: Tensor) -> Tensor:
        """Return the scores that the last token gives to keys so many tokens before it.

        Args:
            last: token id.
            length: L, distances 0 to L - 1.
            keys: (V, K, d) as they are at position 0.

        Returns:
            (L, H, V)
        """
        queries = torch.cat([self.read(torch.tensor([last]), distance).queries for distance in range(length)])
        grouped = queries.unflatten(1, (keys.shape[1], -1))  # (L, K, H / K, d)
        return torch.einsum("lkrd,vkd->lkrv", grouped, keys).flatten(1, 2)

    def agrees(self) -> bool:
        """Whether the weighted mean, written out, is what the ordinary pass of a prompt comes to."""
        ids = (torch.arange(_CHECKED_TOKENS) * 7919 + 5) % self._lm.vocab_size
        last = int(ids[-1])
        tokens = self.read(ids.flip(0))
        scores = torch.stack(
            [
                self.scores(last, distance + 1, tokens.keys[distance, None])[distance, :, 0]
                for distance in range(len(ids))
            ]
        )  # (T, H)
        weights = scores.float().softmax(dim=0)
        values = tokens.values.repeat_interleave(weights.shape[1] // tokens.values.shape[1], dim=1)  # (T, H, e)
        mean = (weights[..., None] * values.float()).sum(dim=0)  # (H, e)
        found = self.finish(last, mean[None].to(self.solving_device, torch.float64))[0].detach()
        ordinary = self._lm.cut(Cut(1)).ordinary(ids)[-1].to(found)
        return float((found - ordinary).norm()) <= _ALIKE * float(ordinary.norm())

    def _read(self, token_ids: Tensor, position: int) -> HeadsOfTokens:
        places = torch.full((len(token_ids), 1), position, device=token_ids.device)
        try:
            with _answered_by(_stop):
                self._open(input_ids=token_ids[:, None], position_ids=places, use_cache=False)
        except _Reached as reached:
            return reached.heads
        raise AssertionError("the first block has no attention")


def open_block(lm: LanguageModel) -> OpenBlock | None:
    """Return the first block of a model, opened; None where its attention is not the plain one, or positions absolute.

    It is checked against an ordinary pass, once a model.
    """

    def made() -> OpenBlock | None:
        try:
            block = OpenBlock(lm)
            return block if block.agrees() else None
        except (AssertionError, AttributeError, TypeError, ValueError, RuntimeError, LookupError):
            return None  # a layout of which the above is not true

    return lm.derived("open block", made)


class _Held(threading.local):
    """What answers for the attention of opened blocks, in this thread."""

    answer: _Answer | None = None


_held = _Held()


@contextmanager
def _answered_by(answer: _Answer) -> Iterator[None]:
    _held.answer = answer
    try:
        yield
    finally:
        _held.answer = None


class _Reached(Exception):  # noqa: N818  not an error: the pass is where it was to end
    """Ends a pass at its first attention, with what enters it."""

    def __init__(self, heads: HeadsOfTokens) -> None:
        self.heads = heads


def _attention(module: nn.Module, *tensors: Tensor, scaling: float | None = None, **kwargs: Any) -> tuple[Any, None]:
    """Stand in for torch's attention: (B, H, Q, d), (B, K, N, d), (B, K, N, e), mask → (B, Q, H, e)."""
    if _held.answer is None or any(kwargs.get(name) is not None for name in _UNUSUAL):
        raise ValueError("not a mean weighted by a softmax of products")
    return _held.answer(module, *tensors, scaling=scaling, **kwargs), None


def _stop(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, scaling: float | None, **___: Any) -> Any:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise _Reached(HeadsOfTokens(queries=query[:, :, 0] * scale, keys=key[:, :, 0], values=value[:, :, 0]))


def _recorder(kept: list[Tensor]) -> _Answer:
    def answer(*tensors: Any, **kwargs: Any) -> Tensor:
        given: Tensor = sdpa_attention_forward(*tensors, **kwargs)[0]
        kept.append(given)
        return given

    return answer


def _opened(lm: LanguageModel, block: nn.Module) -> nn.Module:
    """Return a copy of the trunk with one block alone, whose attention this module answers for."""
    trunk, family = lm.trunk, lm.family
    ends = {name: nn.Identity() for name in family.final if getattr(trunk, name) is not None}
    return clone(trunk, {**ends, family.blocks: nn.ModuleList([with_attention(block, _NAME)])})


AttentionInterface.register(_NAME, _attention)
