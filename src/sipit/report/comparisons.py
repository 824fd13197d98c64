"""Our numbers as rows beside the paper's, and the records of each experiment as rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from sipit.report.page import number

Values = Sequence[dict[str, Any]]  # of the records of one model at one scale, each with its key
Row = tuple[str, tuple[float | None, ...]]  # what it is of, and a number for each column of the paper's table


def ours(name: str, values: Values) -> list[Row]:
    """Return our rows for the paper's table of an experiment; none where it has no such table."""
    return _OURS[name](values) if name in _OURS and values else []


def _distances(values: Values) -> list[Row]:
    blocks = sorted((v for v in values if v["site"] == "block"), key=lambda v: v["layer"])
    if len(blocks) != 3:
        return []
    return [(f"{blocks[0]['n_prompts']:,} prompts, float64", tuple(v["least_varied_float64"] for v in blocks))]


def _precision(values: Values) -> list[Row]:
    least = {v["precision"]: v["distance"] for v in values}
    if not {"int4", "int8", "float32"} <= set(least):
        return []
    four, eight, full = (least[name] for name in ("int4", "int8", "float32"))
    label = f"{values[0]['n_prompts']:,} prompts, after the final norm, int4"
    return [(label, (four, eight, full, four / full))]


def _continuations(values: Values) -> list[Row]:
    return [
        (v["key"], (v["n_prefixes"], v["n_tokens"], v["within"]["n_pairs"], v["within"]["n_collisions"]))
        for v in values
    ]


def _margins(values: Values) -> list[Row]:
    blocks = sorted((v for v in values if v["site"] == "block"), key=lambda v: v["layer"])
    label = f"{values[0]['n_prefixes']} prefixes, the {values[0]['n_tokens']} nearest tokens"
    return [(label, (blocks[0]["least"], blocks[-1]["least"]))]


def _inversion(values: Values) -> list[Row]:
    found: list[Row] = []
    for method in dict.fromkeys(v["method"] for v in values):
        runs = [v for v in values if v["method"] == method]
        seconds, n_exact = [v["seconds"] for v in runs], sum(v["exact"] for v in runs)
        shown = (len(runs), runs[0]["seq_len"], 100 * n_exact / len(runs), fmean(seconds), pstdev(seconds))
        found.append((method, shown))
    return found


def _many(values: Values) -> list[Row]:
    return [
        (
            v["key"],
            (v["n_prompts"], v["seq_len"], 100 * v["n_exact"] / v["n_prompts"], v["seconds"], v["seconds_deviation"]),
        )
        for v in values
    ]


def _share(values: Values) -> list[Row]:
    tried = [100 * v["share_of_vocabulary"] if v["share_of_vocabulary"] is not None else None for v in values]
    rows = _many(values)
    return [(n, (*row, v["vocab_size"], share)) for (n, row), v, share in zip(rows, values, tried, strict=True)]


_OURS: dict[str, Callable[[Values], list[Row]]] = {
    "distances": _distances,
    "precision": _precision,
    "continuations": _continuations,
    "margins": _margins,
    "inversion": _inversion,
    "long-prompts": _many,
    "vocabulary-share": _share,
}


def record_rows(name: str, values: Values) -> list[dict[str, Any]]:
    """Return one row for each thing that the records speak of; a name is a column's heading."""
    return [_shown(name, row) for v in values for row in _spread(name, v)]


def _spread(name: str, v: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a record speaks of: a family of prompts, a constructed case, or the record itself."""
    if name == "families":
        for family in v["families"]:
            nearest = family["pairs"][0]["distance"] if family["pairs"] else None
            yield {**family, "key": f"{v['key']}, {family['family'].replace('_', ' ')}", "least": nearest}
    elif name == "witnesses":
        for case in v["cases"]:
            yield {**case, "key": case["name"], "expected": f"{case['expected']}"}
    else:
        yield v


def _shown(name: str, row: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"of": row["key"]}
    for path in _COLUMNS[name]:
        value: Any = row
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        heading = _HEADINGS.get(path, path.replace("_", " "))
        shown[heading] = 100 * value if path.startswith("share") and value is not None else _plain(value)
    return shown


def _plain(value: Any) -> Any:
    """Return a value as a cell: words for truth values, one string for a list."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(repr(one) if isinstance(one, str) else number(one) for one in value)
    return value


_PRICE = (
    "n_prompts",
    "n_exact",
    "seconds",
    "seconds_deviation",
    "wall_ratio",
    "prefill_ratio",
    "n_passes",
    "is_fitted",
)
_COLUMNS: dict[str, tuple[str, ...]] = {
    "distances": (
        *("n_pairs", "n_collisions", "least_float64", "least_varied_float64", "relative_to_norm", "median"),
        *("mean_cosine", "intrinsic_dimension.two_nn", "intrinsic_dimension.mle", "closest_varied_texts"),
    ),
    "precision": ("n_pairs", "n_collisions", "weight_error", "distance", "relative_to_norm", "relative_to_median"),
    "continuations": ("n_tokens", "n_equal_rows", "within.n_collisions", "across.n_collisions", "least_by_prefix"),
    "families": ("n_prompts", "n_pairs", "n_collisions", "least", "mean_norm"),
    "matched-next-tokens": ("n_prompts", "n_pairs", "n_collisions", "least", "least_of_any", "closest_texts"),
    "margins": ("n_prefixes", "n_tokens", "least", "mean", "median_relative_to_norm"),
    "inversion": ("exact", "exact_tokens", "verdict", "seconds", "wall_ratio", "n_passes", "n_checked", "is_fitted"),
    "long-prompts": (*_PRICE, "share_of_vocabulary"),
    "vocabulary-share": (*_PRICE, "share_of_vocabulary"),
    "time-by-layer": (*_PRICE, "share_of_vocabulary"),
    "stored-dtypes": ("n_prompts", "n_exact"),
    "initialisation": ("n_prompts", "least", "median_norm"),
    "training": ("loss", "least"),
    "witnesses": ("layer", "dtype", "expected", "found", "n_pairs", "n_collisions", "distance"),
    "half-margin": ("n_tokens", "margin", "worst_is_right", "random_right"),
    "repeated-token": ("largest_gap", "least_gap_behind_another_token"),
    "activations": ("activation", "is_analytic", "is_routed"),
}
_HEADINGS = {
    "n_pairs": "pairs",
    "n_collisions": "within 1e-6",
    "n_prompts": "prompts",
    "n_prefixes": "prefixes",
    "n_tokens": "next tokens",
    "n_exact": "exact",
    "n_passes": "passes",
    "n_checked": "tokens checked",
    "n_equal_rows": "pairs with equal rows",
    "within.n_collisions": "within 1e-6, one prefix",
    "across.n_collisions": "within 1e-6, two prefixes",
    "least_by_prefix": "least, by prefix",
    "least": "least L2",
    "least_float64": "least L2, float64",
    "least_varied_float64": "without repeats of one token",
    "least_of_any": "least L2 of any two",
    "distance": "least L2",
    "relative_to_norm": "over the norm",
    "relative_to_median": "over the median distance",
    "median_relative_to_norm": "median over the norm",
    "median": "median L2",
    "mean": "mean",
    "intrinsic_dimension.two_nn": "dimension, TwoNN",
    "intrinsic_dimension.mle": "dimension, likelihood",
    "closest_varied_texts": "closest two",
    "closest_texts": "closest two",
    "seconds": "seconds a prompt",
    "seconds_deviation": "their deviation",
    "wall_ratio": "times a plain pass",
    "prefill_ratio": "prefills",
    "share_of_vocabulary": "of the vocabulary tried, %",
    "worst_is_right": "right in the worst direction",
    "random_right": "share right in random ones",
    "largest_gap": "largest gap alone",
    "least_gap_behind_another_token": "least gap behind another token",
    "is_fitted": "with a fitted inverse",
    "is_analytic": "analytic",
    "is_routed": "routed",
}
