"""`sipit.invert`: one call from leaked states to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipit.errors import OptionError, ShapeError
from sipit.inversion.proposals import Policy
from sipit.inversion.result import Inversion
from sipit.inversion.search import OnProgress, search
from sipit.models import LanguageModel
from sipit.observations import Observation, Site, read_observation


def invert(
    lm: LanguageModel,
    seen: Observation | Tensor | str | Path | Any,
    *,
    layer: int | None = None,
    site: Site | None = None,
    policy: Policy = "auto",
    noise: float = 0.0,
    exhaustive: bool = False,
    max_batch: int = 256,
    seed: int = 0,
    use_fit: bool = True,
    hint: Sequence[int] = (),
    on_progress: OnProgress | None = None,
) -> Inversion:
    """Recover the prompt whose states were observed, token by token, exactly or not at all.

    Every token is accepted because its state, computed behind the tokens before it, lies within the
    measured tolerance of the observed one; the policy decides only how soon it is tried.

    Args:
        lm: the model the states come from.
        seen: an Observation, the path of an observation file, or an array or tensor of shape
            (seq_len, d_model), which needs `layer` or site "final".
        layer: number of blocks run, for a bare array; an Observation brings its own.
        site: "block" (the default) or "final", for a bare array.
        policy: order in which candidates are tried: "auto", "likely", "gradient", "random", "vocabulary".
        noise: L2 distance added to the states on the way here, if any is known. A token that fits
            only thanks to it is the nearest one checked, and the verdict is "ambiguous".
        exhaustive: check the whole vocabulary at every position, so that each runner-up is over all tokens.
        max_batch: most candidates in one packed pass; bounds the memory.
        seed: of the random draws of the policies "random" and "gradient".
        use_fit: whether "auto" may use a fitted inverse that is in the cache directory; see `sipit fit`.
        hint: token ids to try first, from position 0 on: an earlier run's prefix, a known template. A
            right hint costs one forward pass; a wrong one, at most one packed pass.
        on_progress: called after each packed pass.

    Returns:
        The verdict, tokens, text, evidence of every position, and cost.

    Raises:
        ShapeError, NonFiniteError, InputError: the states are not (seq_len, d_model) and finite.
        MismatchError: they carry the fingerprint of another model, or positions are missing.
        OptionError: an argument is out of range.
        StorageError: the file cannot be read.
    """
    observation = _as_observation(lm, seen, layer, site)
    return search(
        lm,
        observation,
        policy=policy,
        noise=noise,
        exhaustive=exhaustive,
        max_batch=max_batch,
        seed=seed,
        use_fit=use_fit,
        hint=hint,
        on_progress=on_progress,
    )


def _as_observation(lm: LanguageModel, seen: Any, layer: int | None, site: Site | None) -> Observation:
    if isinstance(seen, str | Path):
        seen = read_observation(seen)
    if isinstance(seen, Observation):
        if layer is not None and layer != seen.layer:
            raise OptionError(
                f"the observation was taken after {seen.layer} blocks, but layer={layer} was asked for; "
                "leave the layer out"
            )
        if site is not None and site != seen.site:
            raise OptionError(
                f"the observation was taken at site {seen.site!r}, but site={site!r} was asked for; leave the site out"
            )
        return seen
    try:
        states = torch.as_tensor(seen).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"cannot read states from {type(seen).__name__}; pass an Observation, a path, or an array "
            "of shape (seq_len, d_model)"
        ) from error
    site = site or "block"
    return Observation(states=states, layer=lm.checked_layer(layer, site), site=site)
