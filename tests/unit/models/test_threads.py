"""One model, shared by threads: each gets what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sipit
from sipit import LanguageModel
from sipit.models import TruncatedModel, prepacked
from sipit.observations import Cut
from tests.tiny_models import random_ids, tiny_model

_PATIENCE = 0.5  # seconds that one thread gives the other, which must not use them


def _packed(model: TruncatedModel, length: int) -> Tensor:
    """Return the states of four tokens behind a prefix, each alone. (4, D)."""
    ids = random_ids(length + 4, seed=length)
    return model.row(ids[:length]).run(ids[length:], torch.full((4,), length))


@pytest.mark.parametrize("family", ["gpt_neo", "llama"])
def test_packed_pass_is_not_disturbed_by_another_threads(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass stops once its masks are made, until another thread's pass of another shape is over, or has to wait."""
    model = LanguageModel(tiny_model(family)).cut(Cut(4))
    alone = _packed(model, 9), _packed(model, 3)
    is_ready, is_over = threading.Event(), threading.Event()
    found: list[Tensor] = []
    first = threading.Thread(target=lambda: found.append(_packed(model, 9)))
    read = TruncatedModel._read

    def slow(self: TruncatedModel, module: nn.Module, **arguments: Any) -> Tensor:
        if threading.current_thread() is first and arguments["position_ids"].shape[1] == 4:
            is_ready.set()
            is_over.wait(_PATIENCE)
        return read(self, module, **arguments)

    monkeypatch.setattr(TruncatedModel, "_read", slow)
    first.start()
    assert is_ready.wait(60)
    other = _packed(model, 3)
    is_over.set()
    first.join(60)
    assert found, "the first pass failed"
    assert torch.equal(found[0], alone[0])
    assert torch.equal(other, alone[1])


def _at_once(*work: Callable[[], object]) -> None:
    """Run functions in threads of their own, and raise what any of them raised."""
    errors: list[BaseException] = []

    def caught(one: Callable[[], object]) -> None:
        try:
            one()
        except BaseException as error:  # noqa: BLE001  handed on below
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.skipif(not prepacked._serves(torch.float32), reason="this build lays no weights out")
def test_weights_are_not_laid_out_while_another_thread_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count goes over all that is held; another thread may not add to it meanwhile."""
    counting, added = threading.Event(), threading.Event()
    held = prepacked._held_bytes

    def slow() -> int:
        if not counting.is_set():
            counting.set()
            added.wait(_PATIENCE)
            assert not added.is_set(), "weights were laid out while those that are there were counted"
        return held()

    monkeypatch.setattr(prepacked, "_held_bytes", slow)
    first, second = (prepacked.prepacked(nn.Linear(8, 8)) for _ in range(2))

    @torch.no_grad()
    def behind() -> None:
        assert counting.wait(60)
        second(torch.zeros(2, 8))
        added.set()

    _at_once(torch.no_grad()(lambda: first(torch.zeros(2, 8))), behind)


@pytest.mark.parametrize("family", ["gpt_neo", "llama"])
def test_threads_that_invert_by_one_model_find_what_each_finds_alone(family: str) -> None:
    lm = LanguageModel(tiny_model(family))
    prompts = [random_ids(length, seed=length).tolist() for length in (4, 7, 9)]
    seen = [lm.capture(input_ids=ids, layer=layer) for ids, layer in zip(prompts, (2, 2, 3), strict=True)]
    found: dict[int, tuple[int, ...]] = {}

    def inverted(n: int) -> None:
        found[n] = sipit.invert(lm, seen[n]).input_ids

    _at_once(*(lambda n=n: inverted(n) for n in range(3)))
    assert [list(found[n]) for n in range(3)] == prompts
