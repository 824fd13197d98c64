"""Fit an inverse for one or more layers of a model: windows, states, training, calibration, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipit.errors import StorageError
from sipit.float64 import as_float64
from sipit.inversion.fitting.memory import release_free_memory
from sipit.inversion.fitting.states import CapturedStates, OnStep, StatesFolder, capture_windows, sample_windows
from sipit.inversion.fitting.training import Recipe, train
from sipit.inversion.fitting.windows import given_windows, held_out_windows, sample_starts
from sipit.inversion.inverses.fitted_inverse import FittedInverse
from sipit.inversion.inverses.inverse import queries_of
from sipit.inversion.inverses.network import InverseNetwork
from sipit.inversion.inverses.sampled_ids import frequent_and_other_ids
from sipit.inversion.inverses.sinks import sink_cosine
from sipit.inversion.inverses.store import Fit, fit_folder, save_fit
from sipit.inversion.inverses.token_keys import TokenKeys, token_keys
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.storage import held_alone, read_json, write_json

_FIRSTS = 4096  # single tokens the first position is fitted on
_FIRST_FLOOR = 1e-9  # of the mean eigenvalue: the directions that tell tokens apart are that small
_FIRST_BATCH = 256
_HELD_OUT_WINDOWS = 12  # of each kind of text
_HELD_OUT_LENGTH = 64
_SINK_WINDOWS = 4  # of each kind, which show what a state that is no sink looks like
_CALIBRATION_STRIDE = 4  # of the held-out positions, one in so many decides between a few dozen pairs of numbers
_TEMPERATURES = (0.4, 0.5, 0.6, 0.75, 0.9, 1.1, 1.4, 1.8)
_LIKELIHOOD_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5)


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """Where a fit under way stands."""

    phase: str  # "sampling", "capturing", "training block 15", …
    done: int
    total: int
    seconds: float  # since the phase began


OnFitProgress = Callable[[FitProgress], None]


def fit_inverse(
    lm: LanguageModel,
    cuts: Sequence[Cut],
    *,
    texts: Iterable[str] = (),
    recipe: Recipe | None = None,
    on_progress: OnFitProgress | None = None,
) -> dict[Cut, Path]:
    """Fit and keep an inverse for each (layer, site); return the files.

    One capture serves all cuts. Interrupted, it goes on where it stopped when called again with the
    same arguments. Memory is bounded: states lie on disk while fitting (recipe.n_windows × length ×
    width × 2 bytes a cut) and are removed afterwards.

    Raises:
        StorageError: the cache folder cannot be written, or is full, or another process fits this model.
    """
    recipe = recipe or Recipe()
    work = fit_folder(lm) / "work"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with held_alone(fit_folder(lm).with_suffix(".lock"), f"a fit of {lm.name!r}"):
            fits = _fit_in(
                work,
                lm,
                list(dict.fromkeys(Cut(*cut) for cut in cuts)),
                texts=list(texts),
                recipe=recipe,
                on_progress=on_progress,
            )
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write in the cache folder {work}: {error.strerror or error}; free some room, or name "
            "another folder in the environment variable SIPIT_CACHE"
        ) from error
    return fits


def _fit_in(
    work: Path,
    lm: LanguageModel,
    cuts: list[Cut],
    *,
    texts: list[str],
    recipe: Recipe,
    on_progress: OnFitProgress | None,
) -> dict[Cut, Path]:
    started = time.perf_counter()
    start_over_if_changed(work, {"recipe": asdict(recipe), "cuts": cuts, "texts": [hash_text(t) for t in texts]})
    told = _Teller(on_progress)
    n_windows, length, seed = recipe.n_windows, recipe.length, recipe.seed
    starts = sample_starts(lm, n_windows=n_windows, length=length, seed=seed)
    given = given_windows(lm, n_windows=n_windows, length=length, texts=texts, seed=seed)
    widths = {cut: lm.width(cut) for cut in cuts}
    folder = StatesFolder(work, widths, sum(map(len, starts)) + len(given), length)
    spent = sample_windows(lm, starts, cuts, folder, seed=seed, on_step=told.phase("sampling"))
    spent += capture_windows(lm, given, cuts, folder, told.phase("capturing"))
    held_out, more = held_out_windows(lm, n_windows=_HELD_OUT_WINDOWS, length=_HELD_OUT_LENGTH, seed=seed)
    spent += more
    lm.drop_prepacked()  # those in bfloat16, which nothing below uses
    release_free_memory()
    shared_seconds = time.perf_counter() - started
    keys, windows = token_keys(lm), folder.windows
    fits = {}
    for cut, path in folder.paths.items():
        layer, site = cut
        began = time.perf_counter()
        checkpoint = work / f"training-{site}-{layer}.safetensors"
        phase = told.phase(f"training {site} {layer}")
        with CapturedStates(path) as states:
            network = train(states, windows, keys, recipe=recipe, checkpoint=checkpoint, on_step=phase)
        release_free_memory()
        fit = _calibrated(lm, keys, cut, network, held_out=held_out, seed=recipe.seed)
        report = {
            **fit.report,
            "recipe": asdict(recipe),
            "fit_block_tokens": spent // len(cuts) + _FIRSTS * layer,
            "seconds": shared_seconds / len(cuts) + time.perf_counter() - began,
            "n_windows": len(windows),
        }
        fits[cut] = save_fit(lm, cut, replace(fit, report=report))
    return fits


def _first_position(lm: LanguageModel, keys: TokenKeys, cut: Cut, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the position without a prefix, where the state depends on one token alone.

    Returns the states it is fitted on (N, D), their mean (D,), and the map from state to query (D, K).

    In float64: the state can be 22,680 long and nearly constant, the token in its last digits.
    """
    tokens = frequent_and_other_ids(lm.vocab_size, _FIRSTS, torch.Generator().manual_seed(seed + 2))
    model = lm.cut(cut)
    states = [as_float64(model.row().run(part, torch.zeros_like(part))) for part in tokens.split(_FIRST_BATCH)]
    rows = torch.cat(states)  # (N, D)
    mean = rows.mean(dim=0)
    centred = rows - mean
    values, basis = torch.linalg.eigh(centred.T @ centred / len(rows))
    inverse = (basis / (values.clamp(min=0) + _FIRST_FLOOR * values.mean())) @ basis.T  # (D, D)
    return rows, mean, inverse @ (centred.T @ as_float64(keys.keys(tokens)) / len(rows))


@torch.no_grad()
def _calibrated(
    lm: LanguageModel,
    keys: TokenKeys,
    cut: Cut,
    network: InverseNetwork,
    *,
    held_out: dict[str, Tensor],
    seed: int,
) -> Fit:
    """Choose temperature and likelihood weight on held-out windows, and measure the ranks there."""
    layer, site = cut
    tapped = lm.tapped([cut, lm.final_cut])
    firsts, first_mean, first_weight = _first_position(lm, keys, cut, seed)
    passes = {
        kind: [(ids, *(at_cut[0] for at_cut in tapped.states(ids[None]))) for ids in windows]
        for kind, windows in held_out.items()
    }
    rests = torch.cat([states[1:] for seen in passes.values() for _, states, _ in seen[:_SINK_WINDOWS]])
    untuned = Fit(
        network=network,
        first_mean=first_mean,
        first_weight=first_weight,
        sink_cosine=sink_cosine(firsts, rests),
        temperature=1.0,
        likelihood_weight=0.0,
        report={},
    )
    raw = FittedInverse(keys, untuned)
    nats = torch.zeros(len(_TEMPERATURES), len(_LIKELIHOOD_WEIGHTS))
    for seen in passes.values():
        for one in seen:
            scores, logs, targets = (part[::_CALIBRATION_STRIDE] for part in _held_out_scores(lm, raw, *one))
            for i, temperature in enumerate(_TEMPERATURES):
                for j, weight in enumerate(_LIKELIHOOD_WEIGHTS):
                    logits = scores / temperature + weight * logs
                    nats[i, j] += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    best = divmod(int(nats.argmin()), len(_LIKELIHOOD_WEIGHTS))
    temperature, weight = _TEMPERATURES[best[0]], _LIKELIHOOD_WEIGHTS[best[1]]
    kinds = {}
    for kind, seen in passes.items():
        ranks = []
        for one in seen:
            scores, logs, targets = _held_out_scores(lm, raw, *one)
            fused = scores / temperature + weight * logs
            ranks.append(torch.stack([_ranks(scores, targets), _ranks(fused, targets)]))
        alone, together = torch.cat(ranks, dim=1)
        kinds[kind] = {"alone": _figures(alone), "with_likelihood": _figures(together)}
    report: dict[str, Any] = {"layer": layer, "site": site, "held_out": kinds}
    return replace(untuned, temperature=temperature, likelihood_weight=weight, report=report)


def _held_out_scores(
    lm: LanguageModel, raw: FittedInverse, ids: Tensor, states: Tensor, finals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, log-probabilities and true tokens from position 1 on. (T, V), (T, V), (T,)."""
    scores = raw.scores(queries_of(raw, states)[1:])
    logs = lm.next_token_logits(finals[:-1]).log_softmax(dim=1)
    return scores, logs, ids[1:].to(scores.device)


def _ranks(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits > logits.gather(1, targets[:, None])).sum(dim=1).float()


def _figures(ranks: Tensor) -> dict[str, float]:
    return {
        "top_1": float((ranks == 0).float().mean()),
        "top_16": float((ranks < 16).float().mean()),
        "mean_rank": float(ranks.mean()),
        "n_positions": float(len(ranks)),
    }


def hash_text(text: str) -> str:
    """Return a digest of a text, so that a resumed fit knows whether it is the same."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def start_over_if_changed(work: Path, settings: dict[str, Any]) -> None:
    """Drop what an interrupted fit left if it was another fit."""
    note = work / "settings.json"
    settings = json.loads(json.dumps(settings))
    if note.is_file() and read_json(note) == settings:
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(note, settings)


class _Teller:
    """Turns the steps of a phase into progress."""

    def __init__(self, on_progress: OnFitProgress | None) -> None:
        self._on_progress = on_progress

    def phase(self, name: str) -> OnStep:
        began = time.perf_counter()

        def tell(done: int, total: int) -> None:
            if self._on_progress is not None:
                seconds = time.perf_counter() - began
                self._on_progress(FitProgress(phase=name, done=done, total=total, seconds=seconds))

        return tell
