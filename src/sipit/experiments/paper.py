"""The paper's numbers as data, to stand beside ours, and what of them does not fit together: computed, not quoted.

Source: arXiv 2510.15511, the tables named at each.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """Numbers of the paper, a row each model, method or text."""

    columns: tuple[str, ...]  # behind the first, which names the row
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


# Table 1: least L2 distance of last states at layers 1, L/2 and L.
LEAST_BY_LAYER = {
    "Llama-3.1-8B": (0.001, 0.129, 0.620),
    "Mistral-7B-v0.1": (0.002, 0.187, 1.274),
    "Phi-4-mini": (0.014, 1.336, 9.020),
    "TinyStories-33M": (0.029, 1.434, 2.793),
}
# Table 2: least L2 distance at the last layer with weights in FP4, INT8 and FP32.
LEAST_BY_PRECISION = {
    "Llama-3.1-8B": (2.281, 6.597, 1.274),
    "Mistral-7B-v0.1": (1.748, 2.692, 1.136),
    "Phi-4-mini": (18.368, 20.956, 8.780),
}
N_PREFIXES = 10  # of Figure 4: every next token behind each
# Figure 4 and Table 4.
VOCABULARIES = {"Gemma-3-1B": 262_144, "Llama-3.1-8B": 128_255, "Mistral-7B-v0.1": 32_000}


def fp32_minima() -> dict[str, tuple[float, float]]:
    """Return the least distance at the last layer in FP32 by Table 1 and by Table 2. Model → two distances."""
    return {name: (LEAST_BY_LAYER[name][-1], row[-1]) for name, row in LEAST_BY_PRECISION.items()}


def fp4_over_fp32() -> dict[str, float]:
    """Return the least distance in FP4 over that in FP32, by Table 2."""
    return {name: fp4 / fp32 for name, (fp4, _, fp32) in LEAST_BY_PRECISION.items()}


def pairs_of_next_tokens(vocab_size: int, n_prefixes: int = N_PREFIXES) -> int:
    """Return how many pairs of different next tokens there are, both behind the same of some prefixes."""
    return n_prefixes * comb(vocab_size, 2)


def _minima_disagree() -> str:
    found = fp32_minima()
    differ = {name: pair for name, pair in found.items() if pair[0] != pair[1]}
    text = "; ".join(f"{name} {first:.3f} and {second:.3f}" for name, (first, second) in differ.items())
    return (
        f"Tables 1 and 2 give different least distances at the last layer in FP32 for {len(differ)} of {len(found)} "
        f"models: {text}"
    )


def _doubling() -> str:
    ratios = fp4_over_fp32()
    doubled = [name for name, ratio in ratios.items() if ratio > 2]
    text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return (
        f"that FP4 more than doubles the least distance holds for {len(doubled)} of {len(ratios)} models of Table 2, "
        f"{', '.join(doubled)}; FP4 over FP32: {text}"
    )


def _one_vocabulary() -> str:
    text = ", ".join(f"{name} {pairs_of_next_tokens(size):.4g}" for name, size in VOCABULARIES.items())
    return (
        f"343e9 is {N_PREFIXES} times C(262144, 2), so the pairs of one model, and no pair across prefixes; "
        f"by vocabulary: {text}"
    )


MINIMA_DISAGREE = _minima_disagree()
DOUBLING = _doubling()
ONE_VOCABULARY = _one_vocabulary()

TABLE_1 = PaperTable(columns=("layer 1", "layer L/2", "layer L"), rows=tuple(LEAST_BY_LAYER.items()))
TABLE_2 = PaperTable(
    columns=("4 bits", "8 bits", "FP32", "4 bits over FP32"),
    rows=tuple((name, (*row, fp4_over_fp32()[name])) for name, row in LEAST_BY_PRECISION.items()),
)
FIGURE_4 = PaperTable(
    columns=("prefixes", "next tokens", "pairs behind one prefix", "within 1e-6"),
    rows=(("Gemma-3-1B", (N_PREFIXES, VOCABULARIES["Gemma-3-1B"], pairs_of_next_tokens(262_144), 0)),),
)
STEP_MARGINS = PaperTable(columns=("layer 1", "layer L"), rows=(("GPT-2, 1,000 continuations", (1.85, 4.64)),))
TABLE_5 = PaperTable(
    columns=("prompts", "tokens", "exact, %", "seconds a prompt", "their deviation"),
    rows=(
        ("GPT-2, A100, SIPIT", (100, 20, 100, 28.01, 35.87)),
        ("GPT-2, A100, BruteForce", (100, 20, 100, 3889.61, 691.17)),
        ("GPT-2, A100, HardPrompts", (100, 20, 0, 6132.59, 104.61)),
    ),
)
TABLE_7 = PaperTable(
    columns=TABLE_5.columns,
    rows=(
        ("GPT-2, A100, WebText", (50, 100, 100, 146.48, 91.52)),
        ("GPT-2, A100, Wikipedia", (50, 100, 100, 128.62, 83.40)),
        ("GPT-2, A100, random ids", (50, 100, 100, 106.87, 39.10)),
    ),
)
TABLE_4 = PaperTable(
    columns=(*TABLE_5.columns, "vocabulary", "of it tried, %"),
    rows=(
        ("4-bit Mistral-7B-v0.1, A100", (50, 10, 100, 111.78, 46.50, VOCABULARIES["Mistral-7B-v0.1"], 0.19)),
        ("4-bit Llama-3.1-8B, A100", (50, 10, 100, 549.48, 265.75, VOCABULARIES["Llama-3.1-8B"], 0.21)),
    ),
)
