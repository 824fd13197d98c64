"""How far states of prompts lie apart that the model continues with the same token (Table 6, E.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from sipit.collisions import StateFolder, capture_states, nearest_pairs
from sipit.collisions.scales import THRESHOLD
from sipit.experiments.experiment import Experiment, Setting, Task, Values
from sipit.observations import Cut

_GROUPS = 10  # of the commonest next tokens
_HEAD_ROWS = 256  # states whose logits are computed at once


def _matched(setting: Setting) -> Iterator[Task]:
    n = setting.of_scale(80, 4000, 100_000)
    folder = cache(lambda: capture_states(setting.lm, setting.prompts(n, [8, 12]), setting.cuts(), setting.folder))
    groups = cache(lambda: _by_next_token(setting, folder()))

    def made(cut: Cut) -> Values:
        rows = _rows(folder(), cut)
        nearest = {token: nearest_pairs([rows[which]])[0] for token, which in groups().items()}
        token, least = min(nearest.items(), key=lambda item: item[1].distance)
        which = groups()[token]
        pair = [setting.lm.decode(folder().prompt(int(which[i]))) for i in (least.first, least.second)]
        return {
            "layer": cut.layer,
            "site": cut.site,
            "n_groups": len(nearest),
            "n_prompts": sum(len(which) for which in groups().values()),
            "n_pairs": sum(len(which) * (len(which) - 1) // 2 for which in groups().values()),
            "n_collisions": sum(pair.distance <= THRESHOLD for pair in nearest.values()),
            "threshold": THRESHOLD,
            "least": least.distance,
            "least_of_any": nearest_pairs([rows])[0].distance,
            "next_token": setting.lm.decode([token]),
            "closest_texts": pair,
        }

    for cut in setting.cuts():
        yield Task(key=str(cut), make=partial(made, cut))


def _by_next_token(setting: Setting, folder: StateFolder) -> dict[int, Tensor]:
    """Return the prompts of the commonest most probable next tokens, two or more each. Token → (N,)."""
    finals = _rows(folder, setting.lm.final_cut).to(setting.lm.device, setting.lm.dtype)
    following = torch.cat([setting.lm.next_token_logits(part).argmax(dim=1).cpu() for part in finals.split(_HEAD_ROWS)])
    common = Counter(following.tolist()).most_common(_GROUPS)
    return {token: (following == token).nonzero()[:, 0] for token, count in common if count > 1}


def _rows(folder: StateFolder, cut: Cut) -> Tensor:
    return torch.cat([torch.as_tensor(block) for block in folder.blocks(cut)])


MATCHED = Experiment(
    name="matched-next-tokens",
    answers="Table 6, E.3",
    claim="prompts that the model continues with the same token have different states too",
    paper="prompts are grouped by the next token; no pair within 1e-6",
    tasks=_matched,
)
