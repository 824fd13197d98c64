"""From a prompt that comes near to those that may be right: one token or two replaced, moved, dropped or added."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sipit.inversion.inverses.prompt_network import PromptReader
from sipit.inversion.last.decode import Prompt, conditional_logs, read_anew
from sipit.models import LanguageModel
from sipit.observations import Observation

_REPLACED = 24  # tokens tried in one place
_ADDED = 8
_BY_SLOPE = 24  # tokens in one place that the slope of the distance speaks for
_REREAD, _REREAD_BEAMS = 4, 3  # tokens in one place, and prompts read anew before each
_SWEEP = 4096  # tokens of the vocabulary a time


def repaired(reader: PromptReader, white: Tensor, prompt: Prompt, lengths: range) -> Iterator[Prompt]:
    """Yield prompts near one, those that the network holds likeliest first in each kind.

    A token replaced, and all before it read anew; a token dropped, added, or exchanged with its neighbour.
    """
    logs = conditional_logs(reader, white, prompt)  # (T, V)
    top = logs.topk(min(_REPLACED, logs.shape[1]), dim=1).indices.tolist()
    for place in range(len(prompt)):
        for token in top[place]:
            yield (*prompt[:place], token, *prompt[place + 1 :])
    endings = [
        (token, *prompt[place + 1 :])
        for place in range(1, len(prompt))
        for token in dict.fromkeys([prompt[place], *top[place][:_REREAD]])
    ]
    alike = range(max(lengths[0], len(prompt) - 1), min(lengths[-1], len(prompt) + 1) + 1)
    yield from read_anew(reader, white, endings, n_beams=_REREAD_BEAMS, lengths=alike)
    for place in range(len(prompt)):
        if len(prompt) - 1 in lengths:
            yield (*prompt[:place], *prompt[place + 1 :])
        if len(prompt) + 1 in lengths:
            for token in top[place][:_ADDED]:
                yield (*prompt[: place + 1], token, *prompt[place + 1 :])
                yield (*prompt[:place], token, *prompt[place:])
        if place:
            yield (*prompt[: place - 1], prompt[place], prompt[place - 1], *prompt[place + 1 :])


def by_slope(lm: LanguageModel, seen: Observation, prompt: Prompt) -> list[Prompt]:
    """Return prompts with one token replaced, as the slope of the squared distance along the embedding speaks for it.

    Source: Ebrahimi et al. 2018 (arXiv 1712.06751); used for prompts by GCG (arXiv 2307.15043).
    """
    ids = torch.tensor(prompt)
    rows = lm.embeddings.rows(ids).float().to(lm.device)  # (T, D)
    at = rows.to(lm.dtype).detach().requires_grad_(True)
    with torch.enable_grad():
        states = lm.cut(seen.cut, seq_len=len(ids)).from_embeddings(at)[-seen.seq_len :]
        loss = (states.float() - seen.states.to(states.device).float()).square().sum()
        (slope,) = torch.autograd.grad(loss, at)
    best: list[tuple[float, int, int]] = []
    for start, table in lm.embeddings.slices():
        gain = slope.float() @ table.float().T.to(slope.device)  # (T, S): lower is better
        gain -= (slope.float() * rows).sum(dim=1, keepdim=True)
        top = gain.topk(min(_BY_SLOPE, gain.shape[1]), dim=1, largest=False)
        for place, (values, tokens) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            best += [(value, place, start + token) for value, token in zip(values, tokens, strict=True)]
    best.sort()
    kept = best[: _BY_SLOPE * len(prompt)]
    return [(*prompt[:place], token, *prompt[place + 1 :]) for _, place, token in kept]


def swept(reader: PromptReader, white: Tensor, prompt: Prompt) -> Iterator[Prompt]:
    """Yield every token of the vocabulary in every place of a prompt: a share of it in each place in turn."""
    order = conditional_logs(reader, white, prompt).argsort(dim=1, descending=True)  # (T, V)
    for start in range(0, order.shape[1], _SWEEP):
        for place in range(len(prompt)):
            for token in order[place, start : start + _SWEEP].tolist():
                yield (*prompt[:place], token, *prompt[place + 1 :])
