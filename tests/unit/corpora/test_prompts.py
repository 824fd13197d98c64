"""Prompts have the lengths asked for, are distinct, stand in the texts, and follow from the seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sipit import LanguageModel
from sipit.corpora import exact_prompts, special_start
from sipit.errors import InputError, OptionError
from tests.tiny_models import text_model

BOS = 1_000_000
TEXTS = [f"Text {i} counts: " + " ".join(str(j * j + i) for j in range(40)) for i in range(30)]


def letters(text: str) -> Tensor:
    """A tokenizer of one id a character, without special tokens."""
    return torch.tensor([ord(letter) for letter in text])


def with_bos(text: str) -> Tensor:
    return torch.tensor([BOS, *map(ord, text)])


def _text(prompt: Tensor) -> str:
    return "".join(map(chr, prompt.tolist()))


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return [prompt.tolist() for prompt in first] == [prompt.tolist() for prompt in second]


@given(
    n_prompts=st.integers(1, 60),
    lengths=st.lists(st.integers(4, 30), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 9),
)
def test_every_length_is_exact_and_gets_an_equal_share(n_prompts: int, lengths: list[int], seed: int) -> None:
    prompts = exact_prompts(with_bos, TEXTS, n_prompts=n_prompts, lengths=lengths, seed=seed, start=(BOS,))
    counts = Counter(len(prompt) for prompt in prompts)
    assert counts.total() == n_prompts
    assert set(counts) <= set(lengths)
    assert all(counts[length] in (n_prompts // len(lengths), -(-n_prompts // len(lengths))) for length in lengths)
    assert all(prompt.dtype == torch.int64 for prompt in prompts)


def test_no_two_prompts_are_equal_even_if_the_texts_repeat() -> None:
    prompts = exact_prompts(letters, ["abcdefgh " * 30, *TEXTS[:5] * 20], n_prompts=150, lengths=[3, 5], seed=0)
    assert len({tuple(prompt.tolist()) for prompt in prompts}) == 150


def test_prompts_stand_in_a_text() -> None:
    for prompt in exact_prompts(letters, TEXTS, n_prompts=100, lengths=[8, 13], seed=3):
        assert any(_text(prompt) in text for text in TEXTS)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_windows_do_not_overlap(lengths: list[int], seed: int) -> None:
    text = "".join(chr(1000 + i) for i in range(120))  # every token once: an overlap would show as a repeat
    n_prompts = 120 // sum(lengths)
    prompts = exact_prompts(letters, [text], n_prompts=n_prompts, lengths=lengths, seed=seed, per_text=120)
    tokens = torch.cat(prompts).tolist()
    assert len(set(tokens)) == len(tokens)


def test_places_reach_both_ends_of_a_text() -> None:
    firsts = {int(exact_prompts(letters, ["abcde"], n_prompts=1, lengths=[3], seed=s)[0][0]) for s in range(40)}
    assert firsts == set(map(ord, "abc"))


def test_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    first, again, other = (exact_prompts(letters, TEXTS, n_prompts=40, lengths=[6, 9], seed=s) for s in (1, 1, 2))
    assert _same(first, again)
    assert not _same(first, other)


def test_few_windows_are_taken_of_each_text() -> None:
    texts = ["a" + "".join(map(chr, range(1000, 1400))), "".join(map(chr, range(2000, 2400)))]
    prompts = exact_prompts(letters, texts, n_prompts=8, lengths=[5], seed=0, per_text=4)
    assert sorted(int(prompt[-1]) // 1000 for prompt in prompts) == [1] * 4 + [2] * 4


def test_texts_are_read_no_further_than_needed() -> None:
    def endless() -> Iterator[str]:
        for number in range(10**9):
            read.append(number)
            yield "".join(map(chr, range(40 * number, 40 * number + 40)))

    read: list[int] = []
    exact_prompts(letters, endless(), n_prompts=20, lengths=[10], seed=0, per_text=2)
    assert read == list(range(10))


def test_of_a_long_text_one_stretch_is_encoded() -> None:
    def noted(text: str) -> Tensor:
        seen.append(text)
        return letters(text)

    seen: list[str] = []
    long = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    exact_prompts(noted, [long], n_prompts=4, lengths=[5], seed=0, per_text=4)
    assert [len(text) for text in seen] == [4096]
    assert seen[0] in long


def test_every_prompt_begins_as_the_tokenizer_begins_a_text(text_lm: LanguageModel) -> None:
    lm = text_model(bos=True)
    start = special_start(lm.encode)
    assert start == (256,)
    prompts = exact_prompts(lm.encode, TEXTS, n_prompts=50, lengths=[7, 12], seed=0, start=start)
    assert all(prompt[0] == 256 and 256 not in prompt[1:] for prompt in prompts)
    assert special_start(text_lm.encode) == ()


def test_blank_texts_are_passed_over(text_lm: LanguageModel) -> None:
    with pytest.raises(InputError):
        text_lm.encode("")
    prompts = exact_prompts(text_lm.encode, ["", " \n", "some words"], n_prompts=1, lengths=[4], seed=0)
    assert (text_lm.decode(prompts[0]) or "?") in "some words"


def test_too_few_prompts_is_an_error_that_counts_them() -> None:
    with pytest.raises(InputError, match=r"give 2 distinct prompts of 9 .*2 of 5 of length 3, 0 of 4 of length 50"):
        exact_prompts(letters, ["abcdef", "abcdef"], n_prompts=9, lengths=[3, 50], seed=0)


def test_text_without_the_start_is_refused() -> None:
    with pytest.raises(InputError, match="special_start"):
        exact_prompts(letters, TEXTS, n_prompts=1, lengths=[4], seed=0, start=(BOS,))


@pytest.mark.parametrize(
    ("n_prompts", "lengths", "per_text"), [(0, [4], 1), (1, [], 1), (1, [4, 1], 1), (1, [0], 1), (1, [4], 0)]
)
def test_number_out_of_range_is_refused(n_prompts: int, lengths: list[int], per_text: int) -> None:
    with pytest.raises(OptionError):
        exact_prompts(with_bos, TEXTS, n_prompts=n_prompts, lengths=lengths, seed=0, start=(BOS,), per_text=per_text)


def _marks_the_word(text: str, *, joined: bool) -> list[int]:
    """Set a mark before the first word, joined to the next character or on its own: it is text, not a special token."""
    return [ord("▁") + ord(text[0]), *map(ord, text[1:])] if joined else [ord("▁"), *map(ord, text)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (lambda text: [7, *_marks_the_word(text, joined=text[0].isalpha())], (7,)),
        (lambda text: [7, *_marks_the_word(text, joined=not text[0].isalpha())], (7,)),
        (lambda text: [7, 8, *text.encode(), 9], (7, 8)),
        (lambda text: [*map(ord, text), 9], ()),
    ],
)
def test_special_start_is_not_what_texts_happen_to_share(
    tokens: Callable[[str], list[int]], expected: tuple[int, ...]
) -> None:
    assert special_start(lambda text: torch.tensor(tokens(text))) == expected


def test_tokenizer_that_knows_no_word_gives_no_special_start() -> None:
    with pytest.raises(InputError, match="same ids for different texts"):
        special_start(lambda text: torch.tensor([1, *[0] * len(text.split())]))
