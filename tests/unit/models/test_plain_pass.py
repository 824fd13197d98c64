"""The price of a plain pass is that of an ordinary pass: it runs the blocks before the cut, and no others."""

from __future__ import annotations

from sipit import LanguageModel
from sipit.models.plain_pass import plain_seconds
from sipit.observations import Cut
from tests.tiny_models import blocks_of, tiny_model


def test_plain_pass_runs_the_blocks_before_the_cut_once_for_like_lengths() -> None:
    lm = LanguageModel(tiny_model("llama"))
    lm.cut(Cut(2))  # checks itself
    counted = [0] * lm.n_layers
    for number, block in enumerate(blocks_of(lm.model)):
        block.register_forward_hook(lambda *_, number=number: counted.__setitem__(number, counted[number] + 1))
    first = plain_seconds(lm, Cut(2), 12)
    assert counted[0] == counted[1] > 0
    assert counted[2:] == [0, 0]
    before = list(counted)
    assert plain_seconds(lm, Cut(2), 9) == first * 9 / 12
    assert counted == before
    plain_seconds(lm, Cut(2), 40)
    assert counted[0] > before[0]
