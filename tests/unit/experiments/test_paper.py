"""What of the paper's numbers does not fit together is computed from them, and said beside them."""

from __future__ import annotations

from sipit.experiments.catalogue import EXPERIMENTS
from sipit.experiments.paper import fp4_over_fp32, fp32_minima, pairs_of_next_tokens


def test_tables_1_and_2_disagree_on_every_model_they_share() -> None:
    found = fp32_minima()
    assert found == {"Llama-3.1-8B": (0.620, 1.274), "Mistral-7B-v0.1": (1.274, 1.136), "Phi-4-mini": (9.020, 8.780)}
    for name in ("distances", "precision"):
        assert "for 3 of 3 models: Llama-3.1-8B 0.620 and 1.274" in EXPERIMENTS[name].caveat


def test_fp4_doubles_the_least_distance_of_one_model_only() -> None:
    assert {name: round(ratio, 2) for name, ratio in fp4_over_fp32().items()} == {
        "Llama-3.1-8B": 1.79,
        "Mistral-7B-v0.1": 1.54,
        "Phi-4-mini": 2.09,
    }
    assert "holds for 1 of 3 models of Table 2, Phi-4-mini;" in EXPERIMENTS["precision"].caveat


def test_343_billion_pairs_are_those_of_one_vocabulary() -> None:
    pairs = pairs_of_next_tokens(262_144)
    assert pairs == 10 * 262_144 * 262_143 // 2
    assert f"{pairs:,}".startswith("343,")
    assert pairs_of_next_tokens(5, 1) == len([(a, b) for a in range(5) for b in range(a)])
    assert "Llama-3.1-8B 8.225e+10" in EXPERIMENTS["continuations"].caveat
