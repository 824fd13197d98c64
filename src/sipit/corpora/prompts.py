"""Prompts of exact token lengths, cut out of texts, no two equal. Knows a tokenizer only as a function."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from sipit.errors import InputError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

_CHARACTERS_PER_TOKEN = 8  # twice the usual, so that windows can be drawn from among many places
_SHORTEST_STRETCH = 4096  # characters
# No two begin alike in letter, case, script or kind: not even byte pieces or a lone word-start mark are common to all.
_PROBES = ("Water boils.", "zebra", "7 of 9", "(x)", "if not:", "Über", "東京", '"Quote"', "# line")


def exact_prompts(
    encode: Callable[[str], Tensor],
    texts: Iterable[str],
    *,
    n_prompts: int,
    lengths: Sequence[int],
    seed: int,
    start: Sequence[int] = (),
    per_text: int = 64,
) -> list[Tensor]:
    """Return distinct prompts of exact token lengths: windows, drawn at random, of the encoded texts.

    No two windows overlap, no two prompts are equal. Reads only as many texts as it needs and holds
    nothing but the prompts found; of a long text, only one stretch drawn at random is encoded.

    Args:
        encode: text → int64 ids, (T,), as `LanguageModel.encode`.
        texts: any source; not read further than needed.
        n_prompts: how many.
        lengths: in tokens, `start` included; each entry gets an equal share, plus or minus one.
        seed: of the places, of the order of the lengths and of the prompts returned.
        start: ids that the tokenizer puts before every text; each prompt begins with them. See `special_start`.
        per_text: most windows to take of one text, so that a long one does not dominate.

    Returns:
        `n_prompts` tensors, each (length,), in random order.

    Raises:
        InputError: the texts give too few distinct prompts, or one does not begin with `start`.
        OptionError: a number is out of range.
    """
    if n_prompts < 1 or per_text < 1:
        raise OptionError(f"n_prompts is {n_prompts} and per_text {per_text}; both must be at least 1")
    if not lengths or min(lengths) <= len(start):
        raise OptionError(
            f"lengths are {list(lengths)}; give at least one, each above the {len(start)} tokens that every prompt "
            "begins with"
        )
    rng = random.Random(seed)
    wanted = Counter(lengths[i % len(lengths)] for i in range(n_prompts))
    missing = Counter(wanted)
    longest_stretch = max(_SHORTEST_STRETCH, _CHARACTERS_PER_TOKEN * per_text * max(lengths))
    prompts: list[Tensor] = []
    seen: set[bytes] = set()
    for text in texts:
        ids = _encoded_stretch(encode, text, longest_stretch, rng)
        if ids is None:
            continue
        if ids[: len(start)].tolist() != list(start):
            raise InputError(
                f"a text begins with the tokens {ids[: len(start)].tolist()}, not with {list(start)}; "
                "find the start by special_start() with the same tokenizer"
            )
        for begin, length in _windows(len(ids) - len(start), missing, len(start), per_text, rng):
            body = ids[len(start) + begin :][: length - len(start)]
            digest = hashlib.blake2b(body.numpy().tobytes(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                prompts.append(ids.new_tensor([*start, *body.tolist()]))  # (length,)
                missing[length] -= 1
        if not missing.total():
            rng.shuffle(prompts)
            return prompts
    shares = ", ".join(f"{wanted[n] - missing[n]} of {wanted[n]} of length {n}" for n in sorted(wanted))
    raise InputError(
        f"the texts give {len(prompts)} distinct prompts of {n_prompts} wanted ({shares}); give more text, "
        f"ask for fewer prompts, or raise per_text above {per_text}"
    )


def special_start(encode: Callable[[str], Tensor]) -> tuple[int, ...]:
    """Return the ids the tokenizer puts before every text, such as a BOS; () if none.

    They are what the encodings of many unlike texts have in common at the start.

    Raises:
        InputError: the tokenizer does not tell those texts apart, so that its common ids prove nothing.
    """
    encoded = [encode(text).tolist() for text in _PROBES]
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*encoded, strict=False))
    common = tuple(column[0] for column in columns)
    if len({tuple(ids) for ids in encoded}) < len(encoded):
        raise InputError(
            f"the tokenizer gives the same ids for different texts, so the tokens {list(common)} at their start "
            "may be text; pass the start yourself"
        )
    return common


def _encoded_stretch(
    encode: Callable[[str], Tensor], text: str, longest: int, rng: random.Random
) -> Tensor | None:  # (T,)
    if len(text) > longest:
        begin = rng.randrange(len(text) - longest + 1)
        text = text[begin : begin + longest]
    return encode(text) if text.strip() else None


def _windows(
    room: int, missing: Counter[int], n_start: int, per_text: int, rng: random.Random
) -> list[tuple[int, int]]:
    """Lay windows of lengths still missing at random, without overlap, into a text of `room` tokens.

    Returns:
        (first token, length of the prompt) of each; a window is `n_start` tokens shorter than its prompt.
    """
    left = Counter(missing)
    chosen: list[int] = []
    while len(chosen) < per_text:
        fitting = [length for length, count in left.items() if count and length - n_start <= room]
        if not fitting:
            break
        length = rng.choices(fitting, weights=[left[length] for length in fitting])[0]
        chosen.append(length)
        left[length] -= 1
        room -= length - n_start
    # The tokens not used are spread over the gaps: uniform over all layouts of these lengths in this order.
    gaps = sorted(rng.randint(0, room) for _ in chosen)
    windows, used = [], 0
    for gap, length in zip(gaps, chosen, strict=True):
        windows.append((gap + used, length))
        used += length - n_start
    return windows
