"""What follows one prefix: every next token (Figure 4), and the one-step margins that noise must stay below half of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, partial

import torch

from sipit.collisions import StateFolder, capture_continuations, survey_continuations, survey_margins
from sipit.experiments.experiment import Experiment, Setting, Task, Values
from sipit.experiments.paper import FIGURE_4, ONE_VOCABULARY, STEP_MARGINS
from sipit.inversion import invert
from sipit.models import LanguageModel
from sipit.observations import Cut, Observation


def _continuations(setting: Setting) -> Iterator[Task]:
    lm = setting.lm
    n_prefixes, n_tokens = setting.of_scale(2, 3, 10), setting.of_scale(200, lm.vocab_size, lm.vocab_size)
    prefixes = setting.prompts(n_prefixes, [8])
    tokens = torch.arange(n_tokens) * max(1, lm.vocab_size // n_tokens) % lm.vocab_size
    cuts = [lm.final_cut] if setting.scale != "paper" else setting.cuts()
    folder: StateFolder | None = None

    def made(cut: Cut) -> Values:
        nonlocal folder
        folder = folder or capture_continuations(lm, prefixes, cuts, setting.folder, token_ids=tokens.unique())
        (found,) = survey_continuations(lm, folder, cuts=[cut])
        values = asdict(found)
        return {key: values[key] for key in values if key not in ("spread",)}

    for cut in cuts:
        yield Task(key=str(cut), make=partial(made, cut))


def _margins(setting: Setting) -> Iterator[Task]:
    prefixes = setting.prompts(setting.of_scale(2, 20, 1000), [8])

    def made(cut: Cut) -> Values:
        n_tokens = setting.of_scale(16, 128, 1000)
        (found,) = survey_margins(setting.lm, prefixes, [cut], n_tokens=n_tokens, seed=setting.seed)
        return asdict(found)

    for cut in setting.cuts()[:2] if setting.scale == "smoke" else setting.cuts():
        yield Task(key=str(cut), make=partial(made, cut))


def _half_margin(setting: Setting) -> Iterator[Task]:
    """Add noise of some times half the margin, in the worst direction and in random ones; take the nearest token."""
    lm, cut = setting.lm, Cut(max(1, setting.lm.n_layers // 2))
    prefix = setting.prompts(1, [6])[0]
    n_tokens = min(lm.vocab_size, setting.of_scale(400, 4096, lm.vocab_size))
    tokens = torch.arange(n_tokens) * max(1, lm.vocab_size // n_tokens) % lm.vocab_size
    states = cache(lambda: _states(lm, prefix, tokens.unique(), cut))

    def made(factor: float) -> Values:
        rows = states()
        first, second, margin = _closest(rows)
        direction = (rows[second] - rows[first]) / margin
        worst = rows[first] + factor * margin / 2 * direction
        draw = torch.Generator().manual_seed(setting.seed)
        noise = torch.randn(64, rows.shape[1], generator=draw, dtype=rows.dtype)
        noise *= factor * margin / 2 / noise.norm(dim=1, keepdim=True)
        typical = torch.cdist(rows[first] + noise, rows[[first, second]], compute_mode="donot_use_mm_for_euclid_dist")
        return {
            "factor": factor,
            "layer": cut.layer,
            "margin": margin,
            "n_tokens": len(rows),
            "worst_is_right": int((rows - worst).norm(dim=1).argmin()) == first,
            "random_right": float((typical[:, 0] < typical[:, 1]).double().mean()),
        }

    for factor in (0.5, 0.9, 1.1, 2.0):
        yield Task(key=f"{factor}", make=partial(made, factor))


def _states(lm: LanguageModel, prefix: torch.Tensor, tokens: torch.Tensor, cut: Cut) -> torch.Tensor:
    model = lm.cut(cut)
    row = model.row(prefix)
    rows = [row.run(part, torch.full_like(part, len(prefix))).cpu() for part in tokens.split(256)]
    return torch.cat(rows).double()


def _closest(rows: torch.Tensor) -> tuple[int, int, float]:
    """Return the closest pair of different rows, and its distance, by float64 differences."""
    best = (0, 1, float("inf"))
    for i, row in enumerate(rows[:-1]):
        gaps = (rows[i + 1 :] - row).norm(dim=1)
        gaps[gaps == 0] = torch.inf
        if float(gaps.min()) < best[2]:
            best = (i, i + 1 + int(gaps.argmin()), float(gaps.min()))
    return best


def _rounded_rows(setting: Setting) -> Iterator[Task]:
    """Invert states whose dtype is coarser than the model's: what is stored, not what was computed."""
    prompts = setting.prompts(setting.of_scale(1, 5, 50), [12])

    def made(dtype: str) -> Values:
        cut = Cut(max(1, setting.lm.n_layers // 2))
        exact = 0
        for ids in prompts:
            seen: Observation = setting.lm.capture(input_ids=ids, layer=cut.layer, dtype=dtype)
            found = invert(setting.lm, seen)
            exact += found.verdict == "recovered" and found.input_ids == tuple(ids.tolist())
        return {"dtype": dtype, "layer": cut.layer, "n_prompts": len(prompts), "n_exact": exact}

    for dtype in ("float32", "bfloat16", "float16"):
        yield Task(key=dtype, make=partial(made, dtype))


CONTINUATIONS = Experiment(
    name="continuations",
    answers="Figure 4",
    claim="no two of all next tokens behind one prefix have states within 1e-6",
    paper="the 10 closest prompts, every next token behind each: 343e9 pairs, none of which collides",
    paper_table=FIGURE_4,
    caveat=ONE_VOCABULARY,
    tasks=_continuations,
    paper_models=("google/gemma-3-1b-pt", "openai-community/gpt2"),
    paper_needs="24 GB of GPU memory, 60 GB of disk, some hours a model",
)
MARGINS = Experiment(
    name="margins",
    answers="one-step margins",
    claim="the margin that noise must stay below half of is far above rounding, and rises with the layer",
    paper="GPT-2, 1,000 continuations: 1.85 at layer 1, rising to 4.64 at layer 12",
    paper_table=STEP_MARGINS,
    tasks=_margins,
    paper_models=("openai-community/gpt2",),
    paper_needs="4 GB, an hour",
)
HALF_MARGIN = Experiment(
    name="half-margin",
    answers="Theorem 3.2",
    claim="the nearest token is right while noise is below half of the one-step margin",
    paper="proved: an error below half the margin is harmless; above it the worst one is not",
    tasks=_half_margin,
)
ROUNDED = Experiment(
    name="stored-dtypes",
    answers="section 4.2, states as they are stored",
    claim="states stored in a narrower dtype still give the prompt back",
    paper="not in the paper",
    tasks=_rounded_rows,
)
