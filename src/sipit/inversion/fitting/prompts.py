"""Train a prompt network: windows of text, the states of their tokens, and the prompts that end there.

Every position t of a window is the last one of the prompt that its first t + 1 tokens are, so one pass of a
window gives as many examples as it has tokens. States are captured as the training goes, and used again a few
times. B prompts a step, L = longest prompt, D = width of a state, K = width of a key, V = vocab_size.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sipit.corpora import library_code, library_prose, special_start
from sipit.errors import StorageError
from sipit.inversion.fitting.checkpoint import resumed, save_checkpoint
from sipit.inversion.fitting.fit import FitProgress, OnFitProgress, hash_text, start_over_if_changed
from sipit.inversion.fitting.memory import release_free_memory
from sipit.inversion.fitting.sampling import written_on
from sipit.inversion.fitting.windows import sample_starts
from sipit.inversion.inverses.arithmetic import fast_arithmetic
from sipit.inversion.inverses.network import KEY_LENGTH, unit_rms
from sipit.inversion.inverses.prompt_network import PromptNetwork, key_table
from sipit.inversion.inverses.prompt_store import PromptFit, save_prompt_fit
from sipit.inversion.inverses.restored import restored
from sipit.inversion.inverses.store import fit_folder
from sipit.inversion.inverses.whitening import whitening
from sipit.models import LanguageModel
from sipit.observations import Cut
from sipit.storage import held_alone, whole_file

_RIDGE, _GAIN = 0.01, 4.0  # of the linear maps that it starts from
_WHITENING_FLOOR = 1e-4  # of the mean eigenvalue
_CAPTURED = 128  # windows a pass
_PARTS = 4  # lengths of one step are padded to the longest of so many parts
_SAVE_EVERY = 200  # steps
_CODE_SHARE = 0.15  # of the library's text
_LAST_STEPS = 100  # whose loss is reported
_FEW_PACKAGES = (  # whose prose is enough for linear maps: to read all of the library takes longer than to solve them
    *("argparse", "asyncio", "collections", "concurrent", "ctypes", "datetime", "decimal", "difflib", "email"),
    *("fractions", "functools", "http", "inspect", "json", "logging", "multiprocessing", "optparse", "pathlib"),
    *("random", "shutil", "statistics", "string", "subprocess", "tempfile", "threading", "typing", "unittest"),
    *("urllib", "wsgiref", "xml", "zipfile"),
)


@dataclass(frozen=True, kw_only=True)
class PromptRecipe:
    """How a prompt network is trained; the defaults are the measured ones."""

    max_tokens: int = 12
    n_steps: int = 4000
    d_hidden: int = 256
    n_blocks: int = 3
    n_prompts: int = 256  # a step
    n_new: int = 16  # windows captured a step
    n_kept: int = 24_000  # windows whose states are kept to be used again
    n_first: int = 5120  # captured before the first step, which the linear maps are solved on
    n_negatives: int = 2048
    learning_rate: float = 2e-3
    linear_rate: float = 0.1  # of the linear maps, relative to it
    weight_decay: float = 0.01
    random_share: float = 0.13  # of windows that are of random ids
    text_share: float = 0.3  # of the user's text, where there is some
    own_share: float = 0.4  # of the model's own samples
    n_own: int = 280_000  # tokens of them
    seed: int = 0


@dataclass(kw_only=True)
class _Windows:
    """Where windows are drawn from: streams of token ids, and where in them a word starts."""

    streams: list[Tensor]
    shares: list[float]
    vocab_size: int
    length: int
    random_share: float
    is_start: Tensor  # (V,) bool
    special: tuple[int, ...]  # ids that the tokenizer puts before every text
    starts: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        usable = [ids[: max(0, len(ids) - self.length + 1)].long() for ids in self.streams]
        starts = [self.is_start[ids].nonzero()[:, 0] for ids in usable]
        kept = [i for i, found in enumerate(starts) if len(found)]
        self.streams, self.starts = [self.streams[i] for i in kept], [starts[i] for i in kept]
        total = sum(self.shares[i] for i in kept)
        self.shares = [self.shares[i] / total for i in kept]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n windows. (n, L)."""
        counts = [int(n * (1 - self.random_share) * share) for share in self.shares]
        reach, parts = torch.arange(self.length), []
        for ids, starts, count in zip(self.streams, self.starts, counts, strict=True):
            at = starts[torch.randint(len(starts), (count,), generator=generator)]
            parts.append(ids[at[:, None] + reach].long())
        n_random = n - sum(counts)
        parts.append(torch.randint(self.vocab_size, (n_random, self.length), generator=generator))
        mixed = torch.cat(parts)[torch.randperm(n, generator=generator)]
        return torch.cat([torch.tensor(self.special).long().expand(n, -1), mixed], dim=1)[:, : self.length]

    def frequencies(self) -> Tensor:
        """Return how often tokens come, random ones mixed in. (V,)."""
        uniform = torch.full((self.vocab_size,), 1 / self.vocab_size)
        if not self.streams:
            return uniform
        counts = sum(
            share * torch.bincount(ids, minlength=self.vocab_size) / len(ids)
            for ids, share in zip(self.streams, self.shares, strict=True)
        )
        return torch.as_tensor(0.85 * counts + 0.15 * uniform).float()


def fit_prompts(
    lm: LanguageModel,
    cut: Cut,
    *,
    texts: Iterable[str] = (),
    recipe: PromptRecipe | None = None,
    on_progress: OnFitProgress | None = None,
) -> Path:
    """Train and keep the prompt network of a layer and site; return its file.

    Interrupted, it goes on where it stopped when called again with the same arguments.

    Raises:
        StorageError: the cache folder cannot be written, or another process fits this model.
    """
    recipe, texts, cut = recipe or PromptRecipe(), list(texts), restored(lm, cut).cut
    work = fit_folder(lm) / f"work-last-{cut.site}-{cut.layer}"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with held_alone(work.with_suffix(".lock"), f"a fit of {lm.name!r}"):
            settings = {"recipe": asdict(recipe), "texts": [hash_text(text) for text in texts]}
            start_over_if_changed(work, settings)
            began = time.perf_counter()
            windows = _windows(lm, recipe, texts, work, on_progress)
            network, nats = _trained(
                lm, cut, windows, recipe, checkpoint=work / "training.safetensors", on_progress=on_progress
            )
            report = {"recipe": asdict(recipe), "nats": nats, "seconds": time.perf_counter() - began}
            path = save_prompt_fit(lm, cut, PromptFit(network=network, report=report))
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write in the cache folder {work}: {error.strerror or error}; free some room, or name "
            "another folder in the environment variable SIPIT_CACHE"
        ) from error
    return path


def linear_prompts(lm: LanguageModel, cut: Cut, *, n_windows: int = 768, max_tokens: int = 12) -> PromptNetwork:
    """Return the linear maps alone, solved on a few windows in seconds: what a search without a fit starts from."""
    recipe = PromptRecipe(n_blocks=0, d_hidden=8, max_tokens=max_tokens, n_first=n_windows)
    windows = few_windows(lm, max_tokens)
    network, generator = _untrained(lm, cut, recipe)
    _solve(network, _captured(lm, cut, windows, n_windows, generator), key_table(lm), windows.frequencies())
    return network.eval().requires_grad_(False)


def last_differences(lm: LanguageModel, cut: Cut, *, length: int = 6, n: int = 1024) -> Tensor:
    """Return how the last states of prompts differ that end in the same two tokens. (N, W)."""
    windows, generator = few_windows(lm, length), torch.Generator().manual_seed(1)
    one, other = windows.draw(n, generator), windows.draw(n, generator)
    other[:, -2:] = one[:, -2:]
    both = [
        torch.cat([lm.cut(cut).ordinary_batch(part)[:, -1].float() for part in ids.split(_CAPTURED)])
        for ids in (one, other)
    ]
    return both[0] - both[1]


def few_windows(lm: LanguageModel, length: int) -> _Windows:
    """Return windows of a little of the library's text, and of random ids."""
    return _Windows(
        streams=lm.derived("few library ids", lambda: _library(lm, 150_000, only=_FEW_PACKAGES)),
        shares=[1.0],
        vocab_size=lm.vocab_size,
        length=length,
        random_share=PromptRecipe.random_share,
        is_start=_word_starts(lm),
        special=() if lm.tokenizer is None else special_start(lm.encode),
    )


def _library(lm: LanguageModel, n_characters: int, *, only: Collection[str] = ()) -> list[Tensor]:
    """Return the token ids of the library's prose and code, as one stream; none without a tokenizer."""
    if lm.tokenizer is None:
        return []
    parts: list[str] = []
    for share, texts in (
        (1 - _CODE_SHARE, library_prose(seed=0, only=only)),
        (_CODE_SHARE, library_code(seed=0, only=only)),
    ):
        left = share * n_characters
        for text in texts:
            if left <= 0:
                break
            parts.append(text[: int(left) + 1])
            left -= len(text)
    return [_ids(lm, parts)]


def _ids(lm: LanguageModel, texts: Sequence[str]) -> Tensor:
    """Return the ids of some texts one after the other, in half the memory. (N,) int32."""
    return torch.cat([lm.encode(text).int() for text in texts if text.strip()] or [torch.empty(0, dtype=torch.int32)])


def _word_starts(lm: LanguageModel) -> Tensor:
    """Return which tokens begin a word or a line: where a prompt may start. (V,) bool; all without a tokenizer."""
    if lm.tokenizer is None:
        return torch.ones(lm.vocab_size, dtype=torch.bool)
    texts = [lm.decode([token]) or "" for token in range(lm.vocab_size)]
    return torch.tensor([text[:1] in (" ", "\n") or text[:1].isupper() for text in texts])


def _windows(
    lm: LanguageModel, recipe: PromptRecipe, texts: list[str], work: Path, on_progress: OnFitProgress | None
) -> _Windows:
    """Gather the streams; the model's own samples are kept in the folder, for an interrupted fit."""
    streams = _library(lm, 4_000_000)
    shares = [1 - recipe.own_share - (recipe.text_share if texts else 0)] * len(streams)
    if lm.tokenizer is not None:
        streams.append(_own_samples(lm, recipe, work / "samples.safetensors", on_progress))
        shares.append(recipe.own_share)
        if texts:
            streams.append(_ids(lm, texts))
            shares.append(recipe.text_share)
    return _Windows(
        streams=streams,
        shares=shares,
        vocab_size=lm.vocab_size,
        length=recipe.max_tokens,
        random_share=recipe.random_share,
        is_start=_word_starts(lm),
        special=() if lm.tokenizer is None else special_start(lm.encode),
    )


def _own_samples(lm: LanguageModel, recipe: PromptRecipe, kept: Path, on_progress: OnFitProgress | None) -> Tensor:
    if kept.is_file():
        return load_file(kept)["ids"]
    length, skipped = 128, 4  # the first tokens follow a random one, which no text does
    n_windows = -(-recipe.n_own // (length - skipped))
    starts = sample_starts(lm, n_windows=4 * n_windows, length=length, seed=recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    found, began = [], time.perf_counter()
    for start in starts:
        if start.shape[1] > 1:  # a chat's head
            continue
        found.append(written_on(lm, start, length, generator).windows[:, skipped:].reshape(-1).int())
        n_done = sum(map(len, found))
        _tell(on_progress, "sampling", min(n_done, recipe.n_own), recipe.n_own, began)
        if n_done >= recipe.n_own:
            break
    ids = torch.cat(found)
    with whole_file(kept) as temporary:
        save_file({"ids": ids}, temporary)
    lm.drop_prepacked()
    release_free_memory()
    return ids


def _untrained(lm: LanguageModel, cut: Cut, recipe: PromptRecipe) -> tuple[PromptNetwork, torch.Generator]:
    table = key_table(lm)
    network = PromptNetwork(
        lm.width(cut),
        table.shape[1],
        lm.vocab_size,
        max_tokens=recipe.max_tokens,
        d_hidden=recipe.d_hidden,
        n_blocks=recipe.n_blocks,
    ).to(lm.device)
    generator = torch.Generator().manual_seed(recipe.seed)
    network.reset(generator)
    return network, generator


_Captured = tuple[Tensor, Tensor]  # windows (N, L), their states at unit root mean square (N, L, D) float16


def _captured(lm: LanguageModel, cut: Cut, windows: _Windows, n: int, generator: torch.Generator) -> _Captured:
    """Draw windows and run them through the model."""
    model, drawn, states = lm.cut(cut), [], []
    for start in range(0, n, _CAPTURED):
        drawn.append(windows.draw(min(_CAPTURED, n - start), generator))
        states.append(unit_rms(model.ordinary_batch(drawn[-1])).half().cpu())
    return torch.cat(drawn), torch.cat(states)


@torch.no_grad()
def _solve(network: PromptNetwork, captured: _Captured, table: Tensor, frequencies: Tensor) -> None:
    """Set the whitening, how often tokens come, and the maps to a regression of keys at each distance from the end."""
    windows, states = captured
    device = table.device
    rows = states[:, 1:].reshape(-1, states.shape[2]).to(device).float()
    network.bias.copy_((frequencies * len(frequencies)).clamp(min=1e-6).log())
    network.mean.copy_(rows.mean(dim=0))
    centred = (rows - network.mean).cpu().double()
    network.whitener.copy_(whitening(centred.T @ centred / len(centred), _WHITENING_FLOOR))
    for back in range(network.max_tokens):
        last = torch.arange(max(back, 1), windows.shape[1])  # the first state is another kind
        x = network.white(states[:, last].reshape(-1, states.shape[2]).to(device))
        if not len(x):
            continue
        keys = table[windows[:, last - back].reshape(-1).to(device)].float()
        gram = x.T @ x
        gram.diagonal().add_(_RIDGE * len(x))
        network.linear[back] = _GAIN / KEY_LENGTH * torch.linalg.solve(gram, x.T @ keys)


def _trained(
    lm: LanguageModel,
    cut: Cut,
    windows: _Windows,
    recipe: PromptRecipe,
    *,
    checkpoint: Path,
    on_progress: OnFitProgress | None,
) -> tuple[PromptNetwork, float]:
    """Return the trained network and the mean loss of its last steps, in nats a token."""
    network, generator = _untrained(lm, cut, recipe)
    table, device = key_table(lm), lm.device
    pool = _captured(lm, cut, windows, recipe.n_first, generator)
    frequencies = windows.frequencies()
    _solve(network, pool, table, frequencies)
    optimizer = _optimizer(network, recipe)
    first = resumed(checkpoint, network, optimizer)
    lengths = _length_shares(recipe.max_tokens)
    losses: list[float] = []
    began = time.perf_counter()
    for step in range(first, recipe.n_steps):
        generator.manual_seed(recipe.seed * 1_000_003 + step)
        rate = min(1.0, (step + 1) / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.n_steps)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate * group["scale"]
        fresh = _captured(lm, cut, windows, recipe.n_new, generator)
        n_reused = recipe.n_prompts // 4 - recipe.n_new  # of a window's tokens four end a prompt in a step
        reused = torch.randint(len(pool[0]), (max(0, n_reused),), generator=generator)
        batch = tuple(torch.cat([new, old[reused]]) for new, old in zip(fresh, pool, strict=True))
        pool = _kept(pool, fresh, recipe.n_kept, generator)
        last = torch.multinomial(lengths, recipe.n_prompts, replacement=True, generator=generator).sort().values
        which = torch.randperm(recipe.n_prompts, generator=generator) % len(batch[0])
        negatives = torch.multinomial(frequencies, recipe.n_negatives, replacement=True, generator=generator)
        loss = _loss(
            network, batch, which, last, negatives=negatives.to(device), frequencies=frequencies.to(device), table=table
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        _tell(on_progress, f"training on {cut}", step + 1, recipe.n_steps, began)
        if (step + 1) % _SAVE_EVERY == 0:
            save_checkpoint(checkpoint, step + 1, network, optimizer)
            release_free_memory()
    recent = losses[-_LAST_STEPS:]
    return network.eval().requires_grad_(False), sum(recent) / max(1, len(recent))


def _kept(pool: _Captured, fresh: _Captured, most: int, generator: torch.Generator) -> _Captured:
    """Return the pool with fresh windows in it, over others at random once it is full."""
    if len(pool[0]) < most:
        return torch.cat([pool[0], fresh[0]]), torch.cat([pool[1], fresh[1]])
    at = torch.randperm(len(pool[0]), generator=generator)[: len(fresh[0])]
    for old, new in zip(pool, fresh, strict=True):
        old[at] = new
    return pool


def _length_shares(max_tokens: int) -> Tensor:
    """Return how often prompts of each length are trained on: those of 4 to 8 tokens most. (L,)."""
    lengths = torch.arange(1, max_tokens + 1).float()
    return torch.exp(-(((lengths - 6.5) / 3.2) ** 2))


def _loss(
    network: PromptNetwork,
    batch: tuple[Tensor, ...],
    which: Tensor,
    last: Tensor,
    *,
    negatives: Tensor,
    frequencies: Tensor,
    table: Tensor,
) -> Tensor:
    """Return the cross-entropy of the prompts' tokens among sampled ones, and of where they start, in nats.

    Each logit is corrected by how often its token is in the sample, so that the softmax over the vocabulary is
    calibrated. `which` (B,) of the windows, rising `last` (B,) position of the prompt's last token in it.
    """
    windows, states = batch
    device = table.device
    queries, ends, targets = [], [], []
    with fast_arithmetic(device, torch.float32):
        for part in torch.arange(len(last)).chunk(_PARTS):
            n_steps = int(last[part].max()) + 1
            back = last[part][:, None] - torch.arange(n_steps)  # (P, N) positions, the last one first
            read = windows[which[part][:, None], back.clamp(min=0)].to(device)
            is_there = (back >= 0).to(device)
            reached = torch.cat([is_there.new_ones(len(part), 1), is_there], dim=1)  # (P, N + 1)
            targets.append(F.pad(read.masked_fill(~is_there, -1), (0, 1), value=-1)[reached])
            white = network.white(states[which[part], last[part]].to(device))
            query, end = network(white, table[read].float())
            queries.append(query[reached])
            ends.append(end[reached])
        target = torch.cat(targets)  # (M,), -1 for the end
        is_token = target >= 0
        tokens, place = torch.unique(torch.cat([negatives, target[is_token]]), return_inverse=True)  # (C,)
        logits = torch.cat(queries) @ table[tokens].to(queries[0]).T  # (M, C)
    inclusion = -torch.expm1((len(negatives) + int(is_token.sum())) * torch.log1p(-frequencies[tokens]))
    logits = KEY_LENGTH * logits.float() + network.bias[tokens] - inclusion.clamp(min=1e-9).log()
    logits = torch.cat([logits, torch.cat(ends).float()[:, None]], dim=1)
    answer = torch.full_like(target, len(tokens))
    answer[is_token] = place[len(negatives) :]
    return F.cross_entropy(logits, answer)


def _optimizer(network: PromptNetwork, recipe: PromptRecipe) -> torch.optim.Optimizer:
    others = [parameter for name, parameter in network.named_parameters() if name != "linear"]
    groups = [{"params": [network.linear], "scale": recipe.linear_rate}, {"params": others, "scale": 1.0}]
    betas = (0.9, 0.98)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, weight_decay=recipe.weight_decay, fused=True)


def _tell(on_progress: OnFitProgress | None, phase: str, done: int, total: int, began: float) -> None:
    if on_progress is not None:
        seconds = time.perf_counter() - began
        on_progress(FitProgress(phase=phase, done=done, total=total, seconds=seconds))
