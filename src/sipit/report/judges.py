"""Whether each claim held, by the numbers of its records: one model at one scale at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal

from sipit.report.page import number

Kind = Literal["held", "limit", "wrong", "open"]
Values = Sequence[dict[str, Any]]  # of the records, each with its key
Judge = Callable[[Values], tuple[Kind, str]]
_FLAT = 2.0  # times, between the slowest and the fastest layer: more is no longer "hardly depends"
_SMALL_SHARE = 0.01  # of the vocabulary


def worst(kinds: Sequence[Kind]) -> Kind:
    """Return what can be said of all of them: the weakest."""
    order: tuple[Kind, ...] = ("wrong", "limit", "held")
    return next((kind for kind in order if kind in kinds), "open")


def judge(name: str, values: Values) -> tuple[Kind, str]:
    """Return whether the claim of an experiment held, and by which numbers, in a sentence."""
    return _JUDGES[name](values) if values else ("open", "No record yet.")


def _distances(values: Values) -> tuple[Kind, str]:
    pairs, hits = sum(v["n_pairs"] for v in values), sum(v["n_collisions"] for v in values)
    varied = min(v["least_varied_float64"] for v in values)
    least = min(v["least_float64"] for v in values)
    threshold = max(v["threshold"] for v in values)
    says = f"{hits} of {pairs:,} pairs within 1e-6; the closest in float64 {number(least)} apart"
    repeats = f", {number(varied)} where no prompt repeats one token only"
    # In float32 rounding alone may hide a collision, or make one.
    if (hits or least <= threshold) and varied > threshold:
        return "limit", f"{says}{repeats}: prompts of one repeated token are the exception."
    return ("held" if varied > threshold else "wrong"), says + repeats + "."


def _precision(values: Values) -> tuple[Kind, str]:
    gaps = {v["precision"]: v["distance"] for v in values}
    text = ", ".join(f"{precision} {number(gap)}" for precision, gap in gaps.items())
    hits = sum(v["n_collisions"] for v in values)
    says = f"{hits} pairs within 1e-6; closest pair: {text}"
    if {"int4", "float32"} <= set(gaps):
        times = gaps["int4"] / gaps["float32"]
        says += f"; 4 bits bring it to {number(times)} times, {'more' if times > 2 else 'not more'} than double"
        return ("limit" if hits or times <= 2 else "held"), f"{says}."
    return ("limit" if hits else "held"), f"{says}."


def _continuations(values: Values) -> tuple[Kind, str]:
    inside = sum(v["within"]["n_collisions"] for v in values)
    pairs = sum(v["within"]["n_pairs"] for v in values)
    equal = max(v["n_equal_rows"] for v in values)
    least = min(min(v["least_by_prefix"]) for v in values)
    rows = f"; {equal} pairs of tokens with equal embedding rows are left out: they collide behind every prefix"
    return ("limit" if inside or equal else "held"), (
        f"{inside} of {pairs:,} pairs behind one prefix within 1e-6, the closest {number(least)} apart"
        f"{rows if equal else ''}."
    )


def _families(values: Values) -> tuple[Kind, str]:
    found = [(f["pairs"][0]["distance"], f["family"], v["key"]) for v in values for f in v["families"] if f["pairs"]]
    hits = sum(f["n_collisions"] for v in values for f in v["families"])
    least = min(found, default=(0.0, "none", ""))
    is_as_said = not hits and least[1] == "trailing_newlines"
    newlines = min((one for one in found if one[1] == "trailing_newlines"), default=(0.0, "", "none"))
    return ("held" if is_as_said else "limit"), (
        f"{hits} pairs within 1e-6; the closest pair, {number(least[0])}, is of the family "
        f"{least[1].replace('_', ' ')} ({least[2]}); that of trailing newlines is {number(newlines[0])} "
        f"apart ({newlines[2]})."
    )


def _matched(values: Values) -> tuple[Kind, str]:
    hits, pairs = sum(v["n_collisions"] for v in values), sum(v["n_pairs"] for v in values)
    text = ", ".join(f"{v['key']} {number(v['least'])} (any prompts {number(v['least_of_any'])})" for v in values)
    return ("limit" if hits else "held"), f"{hits} of {pairs:,} pairs within 1e-6; closest: {text}."


def _margins(values: Values) -> tuple[Kind, str]:
    blocks = [v for v in values if v["site"] == "block"]
    rises = all(a["least"] <= b["least"] for a, b in pairwise(blocks))
    text = ", ".join(f"{v['key']} {number(v['least'])}" for v in values)
    relative = ", ".join(number(v["median_relative_to_norm"]) for v in values)
    return ("held" if rises else "limit"), (
        f"Least margin: {text}; {'it rises' if rises else 'it does not rise'} with the layer. "
        f"The median over the norm of the states: {relative}."
    )


def _inversion(values: Values) -> tuple[Kind, str]:
    methods: dict[str, list[dict[str, Any]]] = {}
    for v in values:
        methods.setdefault(v["method"], []).append(v)
    exact = {name: sum(v["exact"] for v in runs) for name, runs in methods.items()}
    parts = [
        f"{name} {exact[name]} of {len(runs)} in {number(fmean(v['seconds'] for v in runs))} s"
        for name, runs in methods.items()
    ]
    ours = [v for name in ("auto", "auto-no-fit") for v in methods.get(name, [])]
    stopped = sum(v.get("verdict") == "stopped" for v in ours)
    limits = sorted({v["time_limit"] for v in values})
    kind: Kind = "held" if ours and all(v["exact"] or v.get("verdict") == "stopped" for v in ours) else "wrong"
    if kind == "held" and (stopped or exact.get("hard-prompts")):
        kind = "limit"
        parts += [f"{stopped} of ours had to stop before they were done"] if stopped else []
        parts += ["HardPrompts was not always wrong"] if exact.get("hard-prompts") else []
    return kind, f"Exact answers: {'; '.join(parts)} (mean; stopped after {', '.join(f'{x:g}' for x in limits)} s)."


def _all_exact(values: Values) -> tuple[Kind, str]:
    exact, n = sum(v["n_exact"] for v in values), sum(v["n_prompts"] for v in values)
    ratios = [v["wall_ratio"] for v in values if "wall_ratio" in v]
    times = f", {number(median(ratios))} times a plain pass (median)" if ratios else ""
    return ("held" if exact == n else "wrong"), f"{exact} of {n} exact{times}."


def _share(values: Values) -> tuple[Kind, str]:
    shares = [v["share_of_vocabulary"] for v in values if v["share_of_vocabulary"] is not None]
    kind, says = _all_exact(values)
    if not shares:
        return kind, says
    if kind == "held" and fmean(shares) > _SMALL_SHARE:
        kind = "limit"
    return kind, f"{says[:-1]}; {number(100 * fmean(shares))} % of the vocabulary tried at a position."


def _by_layer(values: Values) -> tuple[Kind, str]:
    kind, says = _all_exact(values)
    spread: dict[int, float] = {}
    for length in sorted({v["seq_len"] for v in values}):
        seconds = [v["seconds"] for v in values if v["seq_len"] == length]
        spread[length] = max(seconds) / min(seconds)
    if kind == "held" and max(spread.values()) > _FLAT:
        kind = "limit"
    text = ", ".join(f"{number(times)} at {length} tokens" for length, times in spread.items())
    return kind, (
        f"{says} Seconds at the slowest place over those at the fastest: {text}. "
        "Only the blocks below the layer are run here, so time follows the layer where a pass is what it costs."
    )


def _initialisation(values: Values) -> tuple[Kind, str]:
    least = min(v["least"] for v in values)
    kind: Kind = "held" if least > 0 else "wrong"
    return kind, f"{len(values)} models in float64: smallest distance {number(least)}, never 0."


def _training(values: Values) -> tuple[Kind, str]:
    text = ", ".join(f"{v['optimiser']} {number(v['least'])}" for v in values)
    return ("held" if all(v["least"] > 0 for v in values) else "wrong"), f"Least distance along training: {text}."


def _witnesses(values: Values) -> tuple[Kind, str]:
    n, right = sum(len(v["cases"]) for v in values), sum(v["as_expected"] for v in values)
    return ("held" if n == right else "limit"), f"{right} of {n} constructions do as expected."


def _half_margin(values: Values) -> tuple[Kind, str]:
    below = [v for v in values if v["factor"] < 1]
    above = [v for v in values if v["factor"] > 1]
    holds = all(v["worst_is_right"] and v["random_right"] == 1 for v in below) and not any(
        v["worst_is_right"] for v in above
    )
    typical = ", ".join(f"{v['factor']:g}: {100 * v['random_right']:.0f} %" for v in values)
    return ("held" if holds else "wrong"), (
        f"The worst direction is right below half the margin and wrong above: {'yes' if holds else 'no'}; "
        f"random directions are right, at each multiple of it: {typical}."
    )


def _repeated(values: Values) -> tuple[Kind, str]:
    text = "; ".join(
        f"{v['family']} {number(v['largest_gap'])} alone, "
        f"{number(v['least_gap_behind_another_token'])} behind another token"
        for v in values
    )
    return "limit", (
        f"Gap between n and n + 1 repeats, float64: {text}. With rotary positions only, such prompts collide up to "
        "rounding: the theorem takes position embeddings that are added to the tokens."
    )


def _activations(values: Values) -> tuple[Kind, str]:
    others = [f"{v['key']} ({v['activation']})" for v in values if not v["is_analytic"]]
    routed = [v["key"] for v in values if v["is_routed"]]
    says = f"{len(values) - len(others)} of {len(values)} families are analytic by their configuration's defaults"
    return ("limit" if others or routed else "held"), (
        f"{says}; not: {', '.join(others) or 'none'}; experts are chosen, which no analytic function does: "
        f"{', '.join(routed) or 'none'}."
    )


_JUDGES: dict[str, Judge] = {
    "distances": _distances,
    "precision": _precision,
    "continuations": _continuations,
    "families": _families,
    "matched-next-tokens": _matched,
    "margins": _margins,
    "inversion": _inversion,
    "long-prompts": _all_exact,
    "vocabulary-share": _share,
    "time-by-layer": _by_layer,
    "stored-dtypes": _all_exact,
    "initialisation": _initialisation,
    "training": _training,
    "witnesses": _witnesses,
    "half-margin": _half_margin,
    "repeated-token": _repeated,
    "activations": _activations,
}
