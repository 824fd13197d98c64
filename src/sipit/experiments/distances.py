"""How far states of different prompts lie apart: by layer (Table 1, Figure 3), by length (Figure 5), by precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sipit.collisions import (
    StateFolder,
    capture_states,
    family_prompts,
    float64_distances,
    in_float64,
    precision_survey,
    sample_texts,
    survey_families,
    survey_layers,
)
from sipit.collisions.survey import LayerSurvey
from sipit.experiments.dimension import intrinsic_dimension
from sipit.experiments.experiment import Experiment, Setting, Task, Values
from sipit.experiments.paper import DOUBLING, MINIMA_DISAGREE, TABLE_1, TABLE_2
from sipit.observations import Cut

_LENGTHS = [4, 6, 8, 10, 12]
_SAMPLED = 2000  # states whose directions are compared


def _captured(setting: Setting) -> StateFolder:
    n = setting.of_scale(120, 4000, 100_000)
    return capture_states(setting.lm, setting.prompts(n, _LENGTHS), setting.cuts(), setting.folder)


def _minimum(setting: Setting) -> Iterator[Task]:
    folder = cache(lambda: _captured(setting))

    def surveyed(cut: Cut) -> Values:
        (found,) = survey_layers(folder(), cuts=[cut], k=3)
        return _layer(setting, folder(), cut, found)

    for cut in setting.cuts():
        yield Task(key=str(cut), make=partial(surveyed, cut))


def _layer(setting: Setting, folder: StateFolder, cut: Cut, found: LayerSurvey) -> Values:
    near, varied = found.closest[0], (found.closest_varied or found.closest)[0]
    pairs = [(folder.prompt(pair.first), folder.prompt(pair.second)) for pair in (near, varied)]
    wide = in_float64(setting.lm)
    least, least_varied = float64_distances(wide, pairs, cut)
    return {
        "layer": cut.layer,
        "site": cut.site,
        "n_prompts": found.n_prompts,
        "n_pairs": found.n_pairs,
        "n_collisions": found.n_collisions,
        "threshold": found.threshold,
        "least": near.distance,
        "least_float64": least,
        "least_varied": varied.distance,
        "least_varied_float64": least_varied,
        "relative_to_norm": varied.relative_to_norm,
        "median": found.spread.median,
        "median_norm": found.median_norm,
        "closest_texts": [setting.lm.decode(ids) for ids in pairs[0]],
        "closest_varied_texts": [setting.lm.decode(ids) for ids in pairs[1]],
        "mean_cosine": _mean_cosine(_sampled_rows(folder, cut)),
        "intrinsic_dimension": intrinsic_dimension(_sampled_rows(folder, cut)),
        "by_length": [asdict(each) for each in found.by_length],
    }


def _sampled_rows(folder: StateFolder, cut: Cut) -> Tensor:
    """Return the first states of a folder at a cut. (N, D) float64."""
    return torch.cat([torch.as_tensor(block) for block in folder.blocks(cut)])[:_SAMPLED].double()


def _mean_cosine(rows: Tensor) -> float:
    """Return the mean cosine of different states, their anisotropy (Ethayarajh 2019, arXiv 1909.00512)."""
    units = torch.nn.functional.normalize(rows, dim=1)
    n = len(units)
    return float((units.sum(dim=0).square().sum() - n) / (n * (n - 1)))


def _by_precision(setting: Setting) -> Iterator[Task]:
    prompts = setting.prompts(setting.of_scale(60, 600, 100_000), _LENGTHS)
    for precision in ("float32", "bfloat16", "int8", "int4"):

        def made(precision: Any = precision) -> Values:
            found = precision_survey(setting.lm, prompts, [setting.lm.final_cut], precisions=[precision])
            return asdict(found[0])

        yield Task(key=precision, make=made)


def _families(setting: Setting) -> Iterator[Task]:
    is_smoke = setting.scale == "smoke"
    samples = sample_texts(n_prose=1, n_code=0 if is_smoke else 1, seed=setting.seed)
    samples = [text[:160] for text in samples] if is_smoke else samples
    counts, words, most = ((1, 2), 2, 2) if is_smoke else ((1, 2, 4, 8, 16), 8, 5)
    families = cache(
        lambda: family_prompts(
            setting.lm, samples, counts=counts, max_words=words, max_sentences=most, seed=setting.seed
        )
    )
    cuts = setting.cuts()[:1] if is_smoke else setting.cuts()

    def made(cut: Cut) -> Values:
        found = survey_families(setting.lm, families(), [cut], k=1)
        return {"layer": cut.layer, "site": cut.site, "families": [asdict(each) for each in found]}

    for cut in cuts:
        yield Task(key=str(cut), make=partial(made, cut))


_HUB = ("meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1", "microsoft/Phi-4-mini-instruct")

MINIMUM = Experiment(
    name="distances",
    answers="Table 1, Figures 3 and 5, E.4 and E.5",
    claim="no two of many different prompts have last states within 1e-6 (L2) at any layer",
    paper="100,000 prompts, 5e9 pairs a model and layer: none",
    paper_table=TABLE_1,
    caveat=MINIMA_DISAGREE,
    tasks=_minimum,
    paper_models=(*_HUB, "roneneldan/TinyStories-33M"),
    paper_needs="80 GB of GPU memory, 200 GB of disk, half a day a model",
)
PRECISION = Experiment(
    name="precision",
    answers="Tables 2 and 3",
    claim="states of models with rounded weights stay apart, and FP4 more than doubles the least distance",
    paper="no collision in FP4 nor INT8; least L2 at the last layer, by the precision of the weights",
    paper_table=TABLE_2,
    caveat=f"{MINIMA_DISAGREE}. And {DOUBLING}",
    tasks=_by_precision,
    paper_models=_HUB,
    paper_needs="80 GB of GPU memory, some hours a model",
)
FAMILIES = Experiment(
    name="families",
    answers="section 4.1, prompts that differ by little",
    claim="the closest pairs are near-identical code that differs by trailing newlines, and even those stay apart",
    paper="closest pairs found: near-identical code that differs by trailing newlines",
    tasks=_families,
    paper_models=_HUB,
    paper_needs="80 GB of GPU memory, an hour a model",
)
