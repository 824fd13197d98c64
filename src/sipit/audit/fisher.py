"""How much each coordinate of the states matters to what the model says next: the diagonal of the Fisher information.

Source of the noise made from it: Hidden-State Privacy Has an Empty Middle (arXiv 2605.24042). T tokens, W = width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sipit.errors import OptionError
from sipit.inversion.judging.calibration import calibration_prompts
from sipit.models import LanguageModel
from sipit.observations import Cut

_DRAWS = 8  # of next tokens, behind each prompt
_LEAST = 1e-6  # of the mean: a coordinate that says less counts as that much


def fisher_diagonal(lm: LanguageModel, cut: Cut) -> Tensor:
    """Return the mean square slope of the log-probability of the next tokens, drawn from the model's own. (W,) float64.

    Of the states behind a block, over the tokens of the calibration prompts but for each one's first. Made once.

    Raises:
        OptionError: the site is not that behind a block, or none follows it.
    """
    if cut.site != "block" or not 0 < cut.layer <= lm.n_layers:
        raise OptionError(f"what the model makes of {cut} is not differentiated; take site block, from layer 1 on")
    return lm.derived(("fisher diagonal", cut), lambda: _measured(lm, cut.layer))


def _measured(lm: LanguageModel, layer: int) -> Tensor:
    block = cast(nn.ModuleList, getattr(lm.trunk, lm.family.blocks))[layer - 1]
    generator = torch.Generator(lm.device).manual_seed(7)
    total, n_states = torch.zeros(lm.d_model, dtype=torch.float64), 0
    for ids in calibration_prompts(lm):
        if len(ids) < 2:
            continue
        leaves: list[Tensor] = []

        def held(_: nn.Module, __: Any, output: Any, leaves: list[Tensor] = leaves) -> Any:
            """Cut the graph behind the block, and keep what goes on from there."""
            states = output[0] if isinstance(output, tuple) else output
            leaves.append(states.detach().requires_grad_(True))
            return (leaves[0], *output[1:]) if isinstance(output, tuple) else leaves[0]

        hook = block.register_forward_hook(held)
        try:
            with torch.enable_grad():
                logits = cast(Any, lm.model)(input_ids=ids[None].to(lm.device), use_cache=False).logits[0].float()
                logs = logits.log_softmax(dim=1)  # (T, V)
                for _ in range(_DRAWS):
                    drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)  # (T, 1)
                    said = logs.gather(1, drawn).sum()
                    (slope,) = torch.autograd.grad(said, leaves[0], retain_graph=True)
                    total += slope[0, 1:].double().square().sum(dim=0).cpu()
        finally:
            hook.remove()
        n_states += _DRAWS * (len(ids) - 1)
    found = total / max(n_states, 1)
    return found.clamp(min=_LEAST * float(found.mean()))
