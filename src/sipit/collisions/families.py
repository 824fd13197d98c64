"""Adversarial families: prompts that differ by little, which is where near-collisions live.

Random prompts are far apart, so finding no collision among them says little. The members of a family
differ by a count of spaces, a digit, a letter's case, the order of sentences. Long runs of one token
matter most: their states converge, and where a model holds no absolute positions and adds no BOS,
prompts of one token repeated have the same state in exact arithmetic, whatever their length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations

import torch
from torch import Tensor

from sipit.collisions.scales import THRESHOLD, closeness
from sipit.collisions.states import OnStep, last_states
from sipit.collisions.store import StateFolder
from sipit.collisions.survey import closest_prompts
from sipit.corpora import library_code, library_prose, special_start
from sipit.errors import InputError, OptionError
from sipit.models import LanguageModel
from sipit.observations import Cut, Site

# Every small count, then neighbours around growing ones: consecutive long runs come closest.
RUNS = (*range(1, 17), *(n + d for n in (32, 64, 128, 256) for d in (-1, 0, 1)), 511, 512)

_DELIMITERS = ("\n", "\t", "  ", ", ", "; ", " | ", " - ", "\n\n")
_NUMBER = "7250914368"
# Enough to choose from; reading the docstrings of the whole library takes a minute.
_PACKAGES = ("argparse", "asyncio", "collections", "email", "json", "logging", "statistics", "textwrap")
_SHORTEST, _LONGEST = 120, 320  # characters of a sample text


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One prompt of a family."""

    ids: Tensor  # (T,)
    label: str  # what was done to which sample text


@dataclass(frozen=True, kw_only=True)
class ClosePair:
    """Two different prompts of a family and the distance of their states."""

    first_ids: list[int]
    second_ids: list[int]
    first_text: str | None  # None without a tokenizer
    second_text: str | None
    first_label: str
    second_label: str
    distance: float  # L2, exact to float64
    relative_to_norm: float | None  # distance / mean norm of the two states
    relative_to_median: float | None  # distance / median distance of the family's pairs


@dataclass(frozen=True, kw_only=True)
class FamilyResult:
    """How close the prompts of one family come at one cut."""

    family: str
    layer: int
    site: Site
    n_prompts: int  # different token sequences
    n_pairs: int  # of prompts with finite states
    n_not_finite: int  # prompts whose state holds NaN or infinity; they take no part
    n_equal: int  # pairs of states equal in every value
    n_collisions: int  # pairs at or below the threshold, the equal ones included
    threshold: float  # L2
    mean_norm: float | None  # of the states
    median_distance: float | None  # of the pairs
    median_is_exact: bool  # over all pairs, not over a sample
    pairs: list[ClosePair]  # the k closest, by rising distance


def sample_texts(*, n_prose: int = 3, n_code: int = 2, seed: int = 0) -> list[str]:
    """Return short passages of the standard library's prose, of two sentences or more, and of its code."""
    prose = (_passage(_sentences(text), " ") for text in library_prose(seed=seed, only=_PACKAGES))
    code = (
        _passage(lines[start:], "\n")
        for lines in (source.splitlines() for source in library_code(seed=seed, only=_PACKAGES))
        for start in [next((i for i, line in enumerate(lines) if line.startswith("def ")), len(lines))]
    )
    kept_prose = (text for text in prose if len(_sentences(text)) > 1 and len(text) >= _SHORTEST)
    kept_code = (text for text in code if len(text) >= _SHORTEST)
    return [*islice(kept_prose, n_prose), *islice(kept_code, n_code)]


def run_lengths(longest: int) -> list[int]:
    """Return run lengths 1, 2, 3, 4, 6, 8, … and the two longest, which come closest to each other."""
    counts = {1, longest - 1, longest}
    step = 2
    while step <= longest:
        counts |= {step, min(3 * step // 2, longest)}
        step *= 2
    return sorted(counts)


def similar_texts(lm: LanguageModel, folder: StateFolder, cut: Cut, *, n: int) -> list[str]:
    """Return the texts of n different prompts out of a survey's closest pairs at a layer, the closest pair's first.

    What the tokenizer puts in front of every text is left out, so that it is not put there twice.

    Args:
        lm: the model that was surveyed, with a tokenizer.
        folder: the survey's states.
        cut: (layer, site).
        n: texts wanted; fewer come back where fewer differ.

    Raises:
        ModelError: the model has no tokenizer.
    """
    n_start = len(special_start(lm.encode))
    texts = (lm.decode(ids[n_start:]) for ids in closest_prompts(folder, cut, n=n))
    return list(dict.fromkeys(text for text in texts if text))


def family_prompts(
    lm: LanguageModel,
    text_samples: Sequence[str] | None = None,
    *,
    similar: Sequence[str] = (),
    counts: Sequence[int] = RUNS,
    max_sentences: int = 5,
    max_words: int = 16,
    seed: int = 0,
) -> dict[str, list[Member]]:
    """Return the families grown from some texts: name → members, no two with the same token ids.

    Prompts longer than the model has positions for are left out.

    Args:
        lm: a model with a tokenizer.
        text_samples: texts to vary; default: five passages of the standard library's prose and code.
        similar: samples to put in every order, each as a sentence of its own: the family "sample_order".
        counts: lengths of the runs of newlines, spaces and repeated tokens.
        max_sentences: sentences (or lines) of a text, or similar samples, that are put in every order.
        max_words: words of a text whose case is changed.
        seed: of the default texts.

    Raises:
        OptionError: there is no text, or a count is below 1.
        ModelError: the model has no tokenizer.
    """
    texts = sample_texts(seed=seed) if text_samples is None else list(text_samples)
    if not texts or min(counts, default=1) < 1:
        raise OptionError("families need one text or more, and counts of 1 or more")
    families: dict[str, dict[tuple[int, ...], Member]] = {}
    for number, text in enumerate(texts):
        written: dict[str, Iterator[tuple[str, str]]] = {
            "trailing_newlines": _trailing(text, "\n", counts),
            "trailing_spaces": _trailing(text, " ", counts),
            "one_digit": _one_digit(text),
            "case": _case(text, max_words),
            "sentence_order": _orders(text, max_sentences),
            "delimiter": _delimiters(text, max_sentences),
        }
        plain = lm.encode(text)
        runs = {"repeated_token": plain[:0], "repeated_ending": plain}
        for name, variants in written.items():
            for label, variant in variants:
                _add(lm, families.setdefault(name, {}), _encoded(lm, variant), f"text {number}: {label}")
        for name, start in runs.items():
            for count in (*counts,):
                ids = torch.cat([start, plain[-1].repeat(count)])
                _add(lm, families.setdefault(name, {}), ids, f"text {number}: its last token {count} times more")
    for label, variant in _sample_orders(similar[:max_sentences]):
        _add(lm, families.setdefault("sample_order", {}), _encoded(lm, variant), label)
    return {name: list(members.values()) for name, members in families.items()}


def survey_families(
    lm: LanguageModel,
    families: Mapping[str, Sequence[Member]],
    cuts: Sequence[Cut],
    *,
    k: int = 3,
    threshold: float = THRESHOLD,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[FamilyResult]:
    """Return, for each family and cut, how close the last-token states of its prompts come.

    A distance is that of states as computed. Prompts of different lengths run in different batches,
    so two that coincide in exact arithmetic differ by rounding, which for long states exceeds the
    threshold; the relative distance shows it, `precision.float64_distances` settles it.

    Args:
        lm: the model.
        families: from `family_prompts`, or any other sets of different prompts.
        cuts: (layer, site) pairs.
        k: closest pairs to report.
        threshold: largest L2 distance counted as a collision.
        seed: of the sample of pairs a large family's median is taken from.
        on_step: told the prompts done and in all.
    """
    total = sum(len(members) for members in families.values())
    done = 0
    results = []
    for name, members in families.items():
        before = done

        def step(n: int, _: int, before: int = before) -> None:
            if on_step is not None:
                on_step(before + n, total)

        captured = last_states(lm, [member.ids for member in members], cuts, on_step=step)
        done += len(members)
        for states, (layer, site) in zip(captured, cuts, strict=True):
            results.append(
                _result(
                    lm,
                    name,
                    members=members,
                    states=states,
                    layer=layer,
                    site=site,
                    k=k,
                    threshold=threshold,
                    seed=seed,
                )
            )
    return results


def _result(
    lm: LanguageModel,
    name: str,
    *,
    members: Sequence[Member],
    states: Tensor,
    layer: int,
    site: Site,
    k: int,
    threshold: float,
    seed: int,
) -> FamilyResult:
    found = closeness(states, k=k, threshold=threshold, seed=seed)
    pairs = []
    for pair in found.pairs:
        first, second = members[pair.first], members[pair.second]
        pairs.append(
            ClosePair(
                first_ids=first.ids.tolist(),
                second_ids=second.ids.tolist(),
                first_text=lm.decode(first.ids),
                second_text=lm.decode(second.ids),
                first_label=first.label,
                second_label=second.label,
                distance=pair.distance,
                relative_to_norm=pair.relative_to_norm,
                relative_to_median=pair.relative_to_median,
            )
        )
    return FamilyResult(
        family=name,
        layer=layer,
        site=site,
        n_prompts=len(members),
        n_pairs=found.n_pairs,
        n_not_finite=found.n_not_finite,
        n_equal=found.n_equal,
        n_collisions=found.n_collisions,
        threshold=threshold,
        mean_norm=found.mean_norm,
        median_distance=found.median_distance,
        median_is_exact=found.median_is_exact,
        pairs=pairs,
    )


def _add(lm: LanguageModel, members: dict[tuple[int, ...], Member], ids: Tensor | None, label: str) -> None:
    if ids is not None and (lm.max_positions is None or len(ids) <= lm.max_positions):
        members.setdefault(tuple(ids.tolist()), Member(ids=ids, label=label))  # the first text to give these ids


def _encoded(lm: LanguageModel, text: str) -> Tensor | None:
    try:
        return lm.encode(text)
    except InputError:  # no tokens, or more than the model has positions for
        return None


def _sentences(text: str) -> list[str]:
    """Return the sentences of running text; the lines of text that has more of those."""
    lines = [line for line in text.splitlines() if line.strip()]
    ended = [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
    return lines if len(lines) > len(ended) else ended


def _passage(parts: Sequence[str], between: str) -> str:
    """Return the longest beginning of some sentences or lines that is short enough."""
    text = ""
    for part in parts:
        longer = f"{text}{between}{part}" if text else part
        if len(longer) > _LONGEST:
            break
        text = longer
    return text.rstrip()


def _trailing(text: str, character: str, counts: Sequence[int]) -> Iterator[tuple[str, str]]:
    for count in (0, *counts):
        yield f"{count} × {character!r} behind", text + character * count


def _one_digit(text: str) -> Iterator[tuple[str, str]]:
    for place in range(len(_NUMBER)):
        for digit in "0123456789":
            number = _NUMBER[:place] + digit + _NUMBER[place + 1 :]
            yield f"number {number}", f"{text}\nNumber: {number}."


def _case(text: str, max_words: int) -> Iterator[tuple[str, str]]:
    yield "as it is", text
    yield "all lower", text.lower()
    yield "all upper", text.upper()
    for match in islice(re.finditer(r"[A-Za-z]+", text), max_words):
        word = match.group()
        for changed in (word.lower(), word.upper(), word.capitalize(), word.swapcase()):
            yield f"{word} → {changed}", text[: match.start()] + changed + text[match.end() :]


def _orders(text: str, max_sentences: int) -> Iterator[tuple[str, str]]:
    parts = _sentences(text)[:max_sentences]
    between = "\n" if "\n".join(parts) in text else " "
    for order in permutations(range(len(parts))):
        yield f"order {' '.join(map(str, order))}", between.join(parts[i] for i in order)


def _sample_orders(samples: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the samples as sentences, in every order; nothing for fewer than two."""
    sentences = [sample.strip().rstrip(".") + "." for sample in samples]
    for order in permutations(range(len(sentences))) if len(sentences) > 1 else ():
        yield f"samples {' '.join(map(str, order))}", " ".join(sentences[i] for i in order)


def _delimiters(text: str, max_sentences: int) -> Iterator[tuple[str, str]]:
    parts = _sentences(text)[:max_sentences]
    yield "spaces between", " ".join(parts)
    for place in range(1, len(parts)):
        for delimiter in _DELIMITERS:
            yield f"{delimiter!r} before part {place}", " ".join(parts[:place]) + delimiter + " ".join(parts[place:])
