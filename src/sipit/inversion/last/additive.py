"""Several tokens of a prompt at once: what each replacement alone does to the last state nearly adds up.

Behind few blocks the last state is a mixture of what its tokens bring. So every likely token is run in every
place of a prompt that comes near, and the tokens are sought whose changes together lead to the observed state:
from inner products alone, without a pass. What is found is run like any other prompt.

T tokens of a prompt, K tokens tried in a place, W width of a row, N = T × K changes, S sets of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sipit.inversion.inverses.whitening import whitening
from sipit.inversion.last.decode import Prompt
from sipit.inversion.last.judge import LastJudge

_SETS = 256  # kept of each size, and run
_FLOOR = 1e-4  # of the mean eigenvalue, added to each


def metric_of(gaps: Tensor) -> Tensor:
    """Return the map under which differences of last states are white. (N, W) → (W, W).

    Of prompts that end alike, so that what a token far from the end does counts as much as what the last one does,
    in which it else drowns.
    """
    gaps = gaps.cpu().double()
    return whitening(gaps.T @ gaps / len(gaps), _FLOOR)


def together(judge: LastJudge, prompt: Prompt, tokens: Tensor, metric: Tensor) -> Iterator[Prompt]:
    """Run every token in its place of a prompt, then yield the sets of replacements that promise most.

    Args:
        judge: what runs prompts; it keeps their states' distances.
        prompt: T token ids.
        tokens: (T, K) ids to try in each place.
        metric: (W, W) under which distances count.
    """
    n_places, n_each = tokens.shape
    base = torch.tensor([prompt])
    singles = base.repeat(n_places * n_each, 1)  # (N, T)
    places = torch.arange(n_places).repeat_interleave(n_each)  # (N,)
    singles[torch.arange(len(singles)), places] = tokens.flatten().cpu()
    states = judge.run(torch.cat([base, singles]))  # (1 + N, W)
    if states is None:
        return
    metric = metric.to(states.device)
    changes = (states[1:] - states[:1]) @ metric  # (N, W)
    sought = (judge.last_row - states[0]) @ metric  # (W,)
    gram = changes @ changes.T  # (N, N)
    alone = gram.diagonal() - 2 * (changes @ sought)  # (N,) what one change does to the squared distance
    found = []
    for chosen in _sets(gram, alone, places.to(gram.device), n_places):
        for members in chosen.tolist():
            made = list(prompt)
            for change in members:
                made[int(places[change])] = int(singles[change, places[change]])
            found.append(tuple(made))
    yield from dict.fromkeys(found)


def _sets(gram: Tensor, alone: Tensor, places: Tensor, n_places: int) -> Iterator[Tensor]:
    """Yield sets of changes in different places that come nearest together, smaller sets first. (S, size).

    Args:
        gram: (N, N) inner products of the changes.
        alone: (N,) what each alone does to the squared distance.
        places: (N,) of the changes.
    """
    sets = torch.arange(len(alone), device=alone.device)[:, None]  # every single change is where pairs start from
    values = alone
    for size in range(2, n_places + 1):
        joined = values[:, None] + alone[None] + 2 * gram[sets].sum(dim=1)  # (S, N)
        for column in sets.T:
            joined.masked_fill_(places[column][:, None] == places[None], torch.inf)
        top = joined.flatten().topk(min(_SETS * size, joined.numel()), largest=False)  # each set comes size times
        grown = torch.cat([sets[top.indices // len(alone)], (top.indices % len(alone))[:, None]], dim=1)
        grown = grown[torch.isfinite(top.values)].sort(dim=1).values
        kept = dict.fromkeys(map(tuple, grown.tolist()))  # nearest first
        sets = torch.tensor(list(kept)[:_SETS], device=alone.device)
        values = alone[sets].sum(dim=1)
        for one in range(size):
            for other in range(one):
                values = values + 2 * gram[sets[:, one], sets[:, other]]
        yield sets
