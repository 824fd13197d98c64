"""What an inverse is fitted on: windows of token ids from what every machine has.

Standard-library prose and code, uniformly random ids, text with a quarter of its tokens replaced,
the model's own samples, and the user's text where there is some. N windows of L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sipit.corpora import library_code, library_prose
from sipit.inversion.fitting.sampling import written_on
from sipit.models import LanguageModel

# A library's text is of few subjects: with more of the model's own writing, text of any other is read better.
_SHARES = {"prose": 0.12, "code": 0.10, "random ids": 0.15, "inserted": 0.14, "own samples": 0.49}
_HELD_OUT = ("asyncio", "email", "xml", "unittest")  # packages of the library kept for the report
_SAMPLE_BATCH = 192  # windows written at once: their keys and values are most of a fit's memory
_REPLACED = 0.25  # of the tokens of an "inserted" window


def given_windows(lm: LanguageModel, *, n_windows: int, length: int, texts: Iterable[str], seed: int) -> Tensor:
    """Return the windows to fit on beside the model's own samples. (N, L) int64.

    Without a tokenizer only random ids are left.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = {kind: round(share * n_windows) for kind, share in _SHARES.items()}
    parts = []
    if lm.tokenizer is None:
        counts |= {"random ids": n_windows - counts["own samples"]}
    else:
        n_base = counts["inserted"] // 2
        prose = text_windows(lm, library_prose(seed=seed, without=_HELD_OUT), counts["prose"] + n_base, length)
        code = text_windows(lm, library_code(seed=seed, without=_HELD_OUT), counts["code"] + n_base, length)
        base = torch.cat([prose[:n_base], code[:n_base]])
        parts = [prose[n_base:], code[n_base:], _inserted(base, lm.vocab_size, generator)]
        parts.append(text_windows(lm, texts, n_windows, length))
    n_random = counts["random ids"]
    parts.append(_permuted(n_random * length, lm.vocab_size, generator).view(-1, length))
    return torch.cat(parts)


def sample_starts(lm: LanguageModel, *, n_windows: int, length: int, seed: int) -> list[Tensor]:
    """Return what the model's own samples start with: random tokens, its chat template. One (B, P) a batch."""
    n_own = round(_SHARES["own samples"] * n_windows)
    head = _chat_head(lm)[: length // 2]
    n_chat = n_own // 6 if len(head) else 0
    generator = torch.Generator().manual_seed(seed + 3)
    first = torch.randint(lm.vocab_size, (n_own - n_chat, 1), generator=generator)
    starts = [*first.split(_SAMPLE_BATCH), *head.repeat(n_chat, 1).split(_SAMPLE_BATCH)]
    return [start for start in starts if start.numel()]


def held_out_windows(lm: LanguageModel, *, n_windows: int, length: int, seed: int) -> tuple[dict[str, Tensor], int]:
    """Return windows by kind of text that nothing is fitted on, and what sampling took. kind → (n_windows, L)."""
    generator = torch.Generator().manual_seed(seed + 1)
    kinds = {"random ids": torch.randint(lm.vocab_size, (n_windows, length), generator=generator)}
    spent = 0
    if lm.tokenizer is not None:
        kinds["prose"] = text_windows(lm, library_prose(seed=seed, only=_HELD_OUT), n_windows, length)
        kinds["code"] = text_windows(lm, library_code(seed=seed, only=_HELD_OUT), n_windows, length)
        head = _chat_head(lm)
        if len(head):
            length = max(length, len(head) + 24)
            kinds["chat"] = written_on(lm, head.repeat(n_windows, 1), length, generator).windows
            spent = n_windows * length * lm.n_layers
    return {kind: windows for kind, windows in kinds.items() if len(windows)}, spent


def text_windows(lm: LanguageModel, texts: Iterable[str], n_windows: int, length: int) -> Tensor:
    """Return up to n windows over the joined token ids of some texts. (N, L)."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= n_windows * length:
            break
        if text.strip():
            ids += lm.encode(text).tolist()
    n_whole = min(len(ids) // length, n_windows)
    return torch.tensor(ids[: n_whole * length], dtype=torch.long).view(n_whole, length)


def _chat_head(lm: LanguageModel) -> Tensor:
    """Return the ids of the chat template up to where the user's words begin; none without one. (P,)."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return torch.empty(0, dtype=torch.long)
    turn = [{"role": "user", "content": "\x01"}]
    text = str(lm.tokenizer.apply_chat_template(turn, tokenize=False)).split("\x01")[0]
    return torch.tensor(lm.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _permuted(n_tokens: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Return random ids in which every token comes up equally often, plus or minus one. (N,)."""
    rounds = -(-n_tokens // vocab_size)
    drawn = [torch.randperm(vocab_size, generator=generator) for _ in range(rounds)]
    return torch.cat(drawn)[:n_tokens] if drawn else torch.empty(0, dtype=torch.long)


def _inserted(windows: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Replace a quarter of the tokens: rare tokens in natural surroundings. (N, L) → (N, L)."""
    replaced = torch.rand(windows.shape, generator=generator) < _REPLACED
    mixed = windows.clone()
    mixed[replaced] = _permuted(int(replaced.sum()), vocab_size, generator)
    return mixed
