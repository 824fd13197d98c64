"""The public calls: from the states of one prompt, or of many, to the prompts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sipit.errors import OptionError, ShapeError
from sipit.inversion.evidence.cost import charge, cost_of
from sipit.inversion.evidence.result import Inversion
from sipit.inversion.fitting import fit_inverse
from sipit.inversion.fitting.fit import OnFitProgress
from sipit.inversion.inverses.store import fit_path
from sipit.inversion.judging.meter import Meter
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.inversion.last.invert_last import LastOptions, holds_last_alone, invert_last
from sipit.inversion.noise.decode import invert_noisy
from sipit.inversion.proposals import Policy
from sipit.inversion.search.across_dtypes import search_across_dtypes
from sipit.inversion.search.arrangement import arrangement_of
from sipit.inversion.search.batching import search, search_together
from sipit.inversion.search.belonging import require_belongs
from sipit.inversion.search.options import OnProgress, SearchOptions
from sipit.models import LanguageModel
from sipit.observations import Cut, Observation, Site, read_observation
from sipit.observations.formats import Wanted, is_foreign, observed, read_dumps
from sipit.workers import Workers

N_SLOTS = 8  # prompts that share their packed passes
FIT_PAYS_AFTER = 20_000  # observed tokens of one layer and site; see "when a fit pays" in docs/figures.md


def invert(
    lm: LanguageModel,
    seen: Observation | Tensor | str | Path | Any,
    *,
    layer: int | None = None,
    site: Site | None = None,
    known_prefix: Sequence[int] | Tensor = (),
    is_shuffled: bool = False,
    is_permuted: bool = False,
    policy: Policy = "auto",
    noise: float | Literal["auto"] | NoiseModel = 0.0,
    exhaustive: bool = False,
    max_batch: int = 256,
    seed: int = 0,
    use_fit: bool = True,
    hint: Sequence[int] = (),
    pass_dtype: str | None = None,
    on_progress: OnProgress | None = None,
) -> Inversion:
    """Recover the prompt whose states were observed, token by token, exactly or not at all.

    Every token is accepted because its state, computed behind the tokens before it, lies within the
    measured tolerance of the observed one; the policy decides only how soon it is tried.

    Args:
        lm: the model the states come from.
        seen: an Observation, the path of an observation file or of another tool's file of one prompt (see
            docs/other-tools.md), or an array or tensor of shape
            (seq_len, d_model), which needs `layer` or site "final".
        layer: number of blocks run, for a bare array; an Observation brings its own.
        site: what leaked, "block" by default, for a bare array; see docs/sites.md.
        known_prefix: token ids before the first row, whose states need not be there: (P,). The rows then
            start at position P; one pass of the prefix is their price.
        is_shuffled: whether the rows are out of order. They are put in order first, by the tokens that they fit
            one after the other; the result names their order.
        is_permuted: whether the columns are, all rows' alike, as behind one secret permutation.
        policy: order in which candidates are tried: "auto", "likely", "gradient", "random", "vocabulary".
        noise: what was added to the states on the way here. A number is the most that it is, as an L2 distance: a
            token that fits only thanks to it is the nearest one checked, and the verdict is "ambiguous". A
            `NoiseModel` says how likely each error is, and "auto" estimates one with the prompt: then the most
            probable prompt is sought, with a posterior for every token, and the verdict is "probable" where the
            prompt's is at least 0.95 and what is left of the rows is such noise; that takes whole rows, one of every
            position. See docs/noise.md.
        exhaustive: check the whole vocabulary at every position, so that each runner-up is over all tokens; under a
            noise model, run it behind the most probable prompt so far.
        max_batch: most candidates in one packed pass; bounds the memory.
        seed: of the random draws of the policies "random" and "gradient".
        use_fit: whether "auto" may use a fitted inverse that is in the cache directory; see `sipit fit`.
        hint: token ids to try first, from the first row on: an earlier run's prefix, a known template. A
            right hint costs one forward pass; a wrong one, at most one packed pass.
        pass_dtype: what the pass that left the states computed in, where the model does not: a dtype, or
            "autocast-bfloat16" or "autocast-float16" (`sipit.models.PASSES`). The search runs in the model's own
            arithmetic; an ordinary pass in the other one decides, and the record is about the model in that.
        on_progress: called after each packed pass.

    Returns:
        The verdict, tokens, text, evidence of every position, and cost.

    Raises:
        ShapeError, NonFiniteError, InputError: the states are not (seq_len, d_model) and finite.
        MismatchError: they carry the fingerprint of another model, or positions are missing.
        OptionError: an argument is out of range.
        StorageError: the file cannot be read.
    """
    observation = observation_at(lm, seen, layer=layer, site=site).behind(known_prefix)
    if holds_last_alone(observation):
        if policy != "auto" or noise or exhaustive or hint or is_shuffled or is_permuted or pass_dtype:
            raise OptionError(
                "the rows are those of the last tokens alone, for which policy, noise, exhaustive, hint, orders and "
                "pass_dtype have no meaning; leave them out"
            )
        return invert_last(lm, observation, use_fit=use_fit)
    if (is_shuffled or is_permuted) and (hint or noise or pass_dtype):
        raise OptionError(
            "rows or columns out of order are put in order without a hint, noise or pass_dtype; leave it out"
        )
    if pass_dtype and noise:
        raise OptionError("rows of a pass in another dtype take no noise; leave it out, or the pass dtype")
    if isinstance(noise, NoiseModel) or noise == "auto":
        model = None if noise == "auto" else noise
        return invert_noisy(lm, observation, model, is_whole=exhaustive, on_progress=on_progress)
    if isinstance(noise, str):
        raise OptionError(f"noise {noise!r} is unknown; pass a number, a NoiseModel, or 'auto'")
    options = SearchOptions(
        policy=policy,
        noise=noise,
        exhaustive=exhaustive,
        max_batch=max_batch,
        seed=seed,
        use_fit=use_fit,
        hint=hint,
        pass_dtype=pass_dtype,
        on_progress=on_progress,
    )
    if is_shuffled or is_permuted:
        return _inverted_in_order(lm, observation, options, is_shuffled=is_shuffled, is_permuted=is_permuted)
    return next(_searched(lm, [observation], options))


def _searched(
    lm: LanguageModel, observations: Sequence[Observation], options: SearchOptions, *, n_slots: int = 1
) -> Iterator[Inversion]:
    """Yield the inversion of each, by searches that share their passes, or by a pass in another dtype each."""
    if options.pass_dtype in (None, lm.arithmetic):
        yield from search_together(lm, observations, options, n_slots=n_slots)
        return
    for seen in observations:
        yield search_across_dtypes(lm, seen, options.pass_dtype, options)


def _inverted_in_order(
    lm: LanguageModel, seen: Observation, options: SearchOptions, *, is_shuffled: bool, is_permuted: bool
) -> Inversion:
    """Put rows and columns in order, then invert them as any others: the order is a proposal, the search its proof."""
    require_belongs(lm, seen)
    began, meter = time.perf_counter(), Meter()
    arrangement = arrangement_of(lm, seen, meter, is_shuffled=is_shuffled, is_permuted=is_permuted)
    rows, columns = arrangement.row_order, arrangement.column_order
    arranged = seen.arranged(row_order=rows, column_order=columns)
    found = search(lm, arranged, replace(options, hint=arrangement.input_ids))
    charge(meter, found)
    cost = cost_of(lm, seen, meter, time.perf_counter() - began)
    return replace(found, observation_sha256=seen.digest(), row_order=rows, column_order=columns, **cost)


def observation_at(lm: LanguageModel, seen: Any, *, layer: int | None = None, site: Site | None = None) -> Observation:
    """Return what was observed: an Observation, what a file holds, or an array at a layer; see `invert`."""
    if isinstance(seen, str | Path) and is_foreign(Path(seen)):
        wanted = Wanted(layer=layer, site=site)
        return observed(read_dumps(Path(seen), wanted), wanted, lm.shape)
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
    layer = lm.checked_layer(layer, site)
    return Observation(states=states, layer=layer, site=site)


def invert_many(
    lm: LanguageModel,
    observations: Sequence[Observation],
    options: SearchOptions | None = None,
    *,
    last: LastOptions | None = None,
    workers: Workers | None = None,
    on_fit: Callable[[Cut, int], None] | None = None,
    on_fit_progress: OnFitProgress | None = None,
) -> Iterator[Inversion]:
    """Yield the inversion of each observation, in their order, as it is done.

    Where the observations of one layer and site hold enough tokens to pay for it, and policy "auto"
    has no fitted inverse for it yet, one is made first.

    Args:
        lm: the model the states come from.
        observations: of any layers and sites.
        options: how to search; with `use_fit` a fitted inverse may be used, and made.
        last: how to search behind observations of the last tokens alone.
        workers: who inverts, a few observations at a time; None: this process, all in one go.
        on_fit: told the (layer, site) and the number of tokens before a fit is made.
        on_fit_progress: told where that fit stands.
    """
    options = options or SearchOptions()
    if options.use_fit and options.policy == "auto":
        for cut in worth_fitting(lm, observations):
            if on_fit is not None:
                on_fit(cut, sum(o.seq_len for o in observations if o.cut == cut))
            fit_inverse(lm, [cut], on_progress=on_fit_progress)
    last = last or LastOptions()
    if workers is not None:
        parts = [list(observations[i : i + N_SLOTS]) for i in range(0, len(observations), N_SLOTS)]
        for found_there in workers.results(_inverted_there, [(part, options, last) for part in parts]):
            yield from found_there
        return
    yield from _inverted_here(lm, observations, options, last)


def _inverted_there(
    lm: LanguageModel, piece: tuple[Sequence[Observation], SearchOptions, LastOptions]
) -> list[Inversion]:
    return list(_inverted_here(lm, *piece))


def _inverted_here(
    lm: LanguageModel, observations: Sequence[Observation], options: SearchOptions, last: LastOptions
) -> Iterator[Inversion]:
    whole = [seen for seen in observations if not holds_last_alone(seen)]
    found = _searched(lm, whole, options, n_slots=N_SLOTS if options.policy == "auto" else 1)
    for seen in observations:
        if holds_last_alone(seen):
            yield invert_last(lm, seen, use_fit=options.use_fit, **asdict(last))
        else:
            yield next(found)


def worth_fitting(lm: LanguageModel, observations: Sequence[Observation]) -> list[Cut]:
    """Return the cuts whose observations pay for a fitted inverse that is not there yet."""
    tokens: Counter[Cut] = Counter()
    for seen in observations:
        if not holds_last_alone(seen):
            tokens[seen.cut] += seen.seq_len
    return [
        cut
        for cut, count in tokens.items()
        if count >= FIT_PAYS_AFTER and cut[0] > 0 and not fit_path(lm, cut).is_file()
    ]
