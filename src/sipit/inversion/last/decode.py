"""Read prompts off the last token's state with a prompt network: the likeliest first, and what may stand in one place.

W beams, V = vocab_size. Tokens are read from the end; prompts are given back from their start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sipit.inversion.inverses.prompt_network import PromptReader

_ROWS = 128  # beams whose whole vocabulary is scored at once
_PER_BEAM = 64  # tokens that one of many beams is continued with, at most

Prompt = tuple[int, ...]


def ranked_prompts(reader: PromptReader, white: Tensor, *, n_beams: int, lengths: range) -> list[Prompt]:
    """Return the prompts that a beam search ends in, the likeliest first.

    Args:
        reader: the network.
        white: (1, D) of the state.
        n_beams: W, prompts kept at each length.
        lengths: of prompts that are wanted.
    """
    return read_anew(reader, white, [()], n_beams=n_beams, lengths=lengths)


def read_anew(
    reader: PromptReader, white: Tensor, endings: Sequence[Prompt], *, n_beams: int, lengths: range
) -> list[Prompt]:
    """Return the prompts that a beam search behind each of several endings leads to, the likeliest first.

    The searches share their passes; none takes beams from another.

    Args:
        reader: the network.
        white: (1, D) of the state.
        endings: tokens that prompts end in, which are taken as known; their own likelihood counts for nothing.
        n_beams: W, prompts kept at each length behind each ending.
        lengths: of prompts that are wanted.
    """
    device, longest = white.device, lengths[-1]
    beams = torch.empty(0, longest, dtype=torch.long, device=device)  # (B, n), last token first
    logs, owners = torch.empty(0, device=device), torch.empty(0, dtype=torch.long, device=device)  # (B,)
    ended: list[tuple[float, Prompt]] = []
    for n_read in range(longest + 1):
        joining = [number for number, ending in enumerate(endings) if len(ending) == n_read]
        if joining:
            backwards = torch.tensor([endings[i][::-1] for i in joining], dtype=torch.long, device=device)
            beams = torch.cat([beams[:, :n_read], backwards])
            logs = torch.cat([logs, torch.zeros(len(joining), device=device)])
            owners = torch.cat([owners, torch.tensor(joining, device=device)])
        if not len(beams):
            continue
        counts = torch.bincount(owners, minlength=len(endings))
        n_each = min(reader.network.vocab_size, max(_PER_BEAM, -(-n_beams // int(counts[counts > 0].min()))))
        n_each = min(n_each, max(n_beams, 1))
        tops: list[tuple[Tensor, Tensor, Tensor]] = []  # log, token, row
        for rows in torch.arange(len(beams), device=device).split(_ROWS):
            found = reader.next_log_probabilities(white, beams[rows]) + logs[rows, None]  # (R, V + 1)
            if n_read in lengths:
                closing = found[:, -1].tolist()
                ended += [(log, tuple(ids[::-1])) for log, ids in zip(closing, beams[rows].tolist(), strict=True)]
            if n_read < longest:
                top = found[:, :-1].topk(n_each, dim=1)
                of_row = rows[:, None].expand(-1, n_each)
                tops.append((top.values.flatten(), top.indices.flatten(), of_row.flatten()))
        if n_read == longest:
            break
        values, tokens, parents = (torch.cat(part) for part in zip(*tops, strict=True))
        kept = _best_of_each(values, owners[parents], n_beams)
        parents = parents[kept]
        beams = torch.cat([beams[parents], tokens[kept][:, None]], dim=1)
        logs, owners = values[kept], owners[parents]
    ended.sort(key=lambda one: -one[0])
    return [prompt for _, prompt in ended]


def _best_of_each(values: Tensor, owners: Tensor, n: int) -> Tensor:
    """Return the places of the n largest values of each owner. (N,), (N,) → (M,)."""
    order = values.argsort(descending=True)
    order = order[owners[order].argsort(stable=True)]  # by owner, the largest first
    sorted_owners = owners[order]
    first = torch.searchsorted(sorted_owners, sorted_owners)  # (N,) where each one's owner begins
    rank = torch.arange(len(order), device=order.device) - first
    return order[rank < n]


def conditional_logs(reader: PromptReader, white: Tensor, prompt: Prompt) -> Tensor:
    """Return the log-probability of every token at every position, behind it the prompt's own tokens. (T, V)."""
    read = torch.tensor([prompt[::-1]], dtype=torch.long, device=white.device)
    return reader.log_probabilities(white, read)[0, :-1, :-1].flip(0)
