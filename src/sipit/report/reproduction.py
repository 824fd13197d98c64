"""The page of a reproduction: each claim of the paper, whether it held here, by which numbers and which command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Protocol

from sipit.report.page import Series, chart, number, page, table

Records = Sequence[dict[str, Any]]
_VERDICTS = {"held": "held", "limit": "held with this limit", "wrong": "did not hold", "open": "not tested here"}


class Claim(Protocol):
    """What the page says of an experiment beside its records, as `experiments.Experiment` has it."""

    @property
    def name(self) -> str: ...

    @property
    def answers(self) -> str: ...

    @property
    def claim(self) -> str: ...

    @property
    def paper(self) -> str: ...


def reproduction_page(records: Records, claims: Mapping[str, Claim]) -> str:
    """Return the page of all records of a folder.

    Args:
        records: as `sipit reproduce` writes them.
        claims: by the name of the experiment, in the order of the page.
    """
    by_name = {name: [r for r in records if r["experiment"] == name] for name in claims}
    judged = {name: _JUDGES[name](_values(by_name[name])) for name in claims}
    rows = []
    for name, one in claims.items():
        kind, says = judged[name]
        rows.append(
            f'<tr><td><a href="#{name}">{escape(one.answers)}</a></td><td>{escape(one.claim)}</td>'
            f'<td class="{kind}">{_VERDICTS[kind]}</td><td>{escape(says)}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in ("where", "claim", "here", "by"))
    overview = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    models = sorted({r["model"] for r in records})
    counts = {kind: sum(found == kind for found, _ in judged.values()) for kind in _VERDICTS}
    lead = ", ".join(f"{n} {_VERDICTS[kind]}" for kind, n in counts.items() if n)
    body = [
        '<p class="lead">What <em>Language Models are Injective and Hence Invertible</em> (arXiv 2510.15511) claims, '
        f"tried on {escape(', '.join(models) or 'no model')}: {lead}.</p>",
        "<p class='soft'>Our numbers stand beside the paper's; the setting differs where the model, the text or the "
        "machine does, and every record says which made it.</p>",
        overview,
        *(_section(one, by_name[name], *judged[name]) for name, one in claims.items()),
    ]
    return page("What of the paper holds here", "\n".join(body), list(records))


def _section(one: Claim, records: Records, kind: str, says: str) -> str:
    parts = [
        f'<h2 id="{one.name}">{escape(one.name)}: {escape(one.answers)}</h2>',
        f"<p>Claim: {escape(one.claim)}.</p><p>Paper: {escape(one.paper)}.</p>",
        f'<p>Here: <span class="{kind}">{_VERDICTS[kind]}</span>. {escape(says)}</p>',
    ]
    if not records:
        return "".join([*parts, f"<pre>sipit reproduce {one.name}</pre>"])
    if one.name in _FIGURES:
        parts.append(_FIGURES[one.name](_values(records)))
    parts.append(_records_table(records))
    first = records[0]
    commands = dict.fromkeys(r["command"] for r in records)
    parts.append("".join(f"<pre>{escape(command)}</pre>" for command in commands))
    parts.append(
        f"<p class='soft'>{escape(first['model'])}, {first['fingerprint'][:19]}…, {first['dtype']} on "
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, scale {first['scale']}, "
        f"{sum(r['seconds'] for r in records):.0f} s in all.</p>"
    )
    return "".join(parts)


def _records_table(records: Records) -> str:
    """Return one row a record: its key and every value that is one number or word."""
    columns: dict[str, None] = {}
    for record in records:
        columns |= dict.fromkeys(k for k, v in record["values"].items() if isinstance(v, int | float | str | bool))
    names = list(columns)[:12]
    rows = [[r["model"], r["key"], *(r["values"].get(name) for name in names), r["seconds"]] for r in records]
    return table(["model", "of", *(name.replace("_", " ") for name in names), "seconds"], rows)


def _values(records: Records) -> list[dict[str, Any]]:
    return [{**r["values"], "key": r["key"], "model": r["model"]} for r in records if "refused" not in r["values"]]


Judge = Callable[[list[dict[str, Any]]], tuple[str, str]]


def _judged(says: Callable[[list[dict[str, Any]]], tuple[str, str]]) -> Judge:
    def judge(values: list[dict[str, Any]]) -> tuple[str, str]:
        return says(values) if values else ("open", "No record yet.")

    return judge


def _distances(values: list[dict[str, Any]]) -> tuple[str, str]:
    pairs, hits = sum(v["n_pairs"] for v in values), sum(v["n_collisions"] for v in values)
    varied = min(v["least_varied_float64"] for v in values)
    least = min(v["least_float64"] for v in values)
    says = f"{hits} of {pairs:,} pairs within 1e-6; the closest in float64 {least:.3g} apart"
    repeats = f", {varied:.3g} where no prompt repeats one token only"
    if hits and varied > 1e-6:
        return "limit", f"{says}{repeats}: prompts of one repeated token are the exception"
    return ("held" if varied > 1e-6 else "wrong"), says + repeats + "."


def _precision(values: list[dict[str, Any]]) -> tuple[str, str]:
    gaps = ", ".join(f"{v['precision']} {number(v['distance'])}" for v in values)
    hits = sum(v["n_collisions"] for v in values)
    return ("limit" if hits else "held"), f"closest pair: {gaps}; {hits} within 1e-6."


def _continuations(values: list[dict[str, Any]]) -> tuple[str, str]:
    inside = sum(v["within"]["n_collisions"] for v in values)
    pairs = sum(v["within"]["n_pairs"] for v in values)
    equal = sum(v["n_equal_rows"] for v in values)
    least = min(min(v["least_by_prefix"]) for v in values)
    return ("held" if not inside else "limit"), (
        f"{inside} of {pairs:,} pairs behind one prefix within 1e-6, the closest {least:.3g} apart; "
        f"{equal} pairs of tokens have equal rows."
    )


def _families(values: list[dict[str, Any]]) -> tuple[str, str]:
    found = [(f["pairs"][0]["distance"], f["family"], v["key"]) for v in values for f in v["families"] if f["pairs"]]
    hits = sum(f["n_collisions"] for v in values for f in v["families"])
    least = min(found, default=(0.0, "none", ""))
    is_as_said = not hits and least[1] == "trailing_newlines"
    newlines = min((one for one in found if one[1] == "trailing_newlines"), default=(0.0, "", "none"))
    return ("held" if is_as_said else "limit"), (
        f"closest pair {least[0]:.3g} in family {least[1].replace('_', ' ')} at {least[2]}, of trailing newlines "
        f"{newlines[0]:.3g} at {newlines[2]}; {hits} within 1e-6."
    )


def _matched(values: list[dict[str, Any]]) -> tuple[str, str]:
    hits, pairs = sum(v["n_collisions"] for v in values), sum(v["n_pairs"] for v in values)
    text = ", ".join(f"{v['key']} {number(v['least'])} (any prompts {number(v['least_of_any'])})" for v in values)
    return ("limit" if hits else "held"), f"{hits} of {pairs:,} pairs within 1e-6; closest: {text}."


def _activations(values: list[dict[str, Any]]) -> tuple[str, str]:
    others = [f"{v['key']} ({v['activation']})" for v in values if not v["is_analytic"]]
    routed = [v["key"] for v in values if v["is_routed"]]
    says = f"{len(values) - len(others)} of {len(values)} families analytic by their configuration's defaults"
    return ("limit" if others or routed else "held"), (
        f"{says}; not: {', '.join(others) or 'none'}; experts are chosen, which no analytic function does: "
        f"{', '.join(routed) or 'none'}."
    )


def _margins(values: list[dict[str, Any]]) -> tuple[str, str]:
    least = [v["least"] for v in values]
    rises = all(a <= b for a, b in pairwise(least))
    text = ", ".join(f"{v['key']} {number(v['least'])}" for v in values)
    return ("held" if rises else "limit"), f"least margin: {text}{'' if rises else '; it does not rise throughout'}."


def _inversion(values: list[dict[str, Any]]) -> tuple[str, str]:
    methods: dict[str, list[dict[str, Any]]] = {}
    for v in values:
        methods.setdefault(v["method"], []).append(v)
    parts = [
        f"{name} {sum(v['exact'] for v in runs)} of {len(runs)} in {fmean(v['seconds'] for v in runs):.3g} s"
        for name, runs in methods.items()
    ]
    ours = [v["exact"] for name in ("auto", "auto-no-fit") for v in methods.get(name, [])]
    limits = sorted({v["time_limit"] for v in values})
    return ("held" if ours and all(ours) else "wrong"), (
        f"{'; '.join(parts)} (mean, time limit {', '.join(f'{x:g}' for x in limits)} s)."
    )


def _all_exact(values: list[dict[str, Any]]) -> tuple[str, str]:
    exact, n = sum(v["n_exact"] for v in values), sum(v["n_prompts"] for v in values)
    ratios = [v["wall_ratio"] for v in values if "wall_ratio" in v]
    times = f", {median(ratios):.3g} times a plain pass (median)" if ratios else ""
    return ("held" if exact == n else "wrong"), f"{exact} of {n} exact{times}."


def _share(values: list[dict[str, Any]]) -> tuple[str, str]:
    shares = [100 * v["share_of_vocabulary"] for v in values if v["share_of_vocabulary"] is not None]
    kind, says = _all_exact(values)
    return kind, f"{says[:-1]}; {fmean(shares):.3g} % of the vocabulary tried at a position." if shares else says


def _initialisation(values: list[dict[str, Any]]) -> tuple[str, str]:
    least = min(v["least"] for v in values)
    return (
        "held" if least > 0 else "wrong"
    ), f"{len(values)} models in float64: smallest distance {least:.3g}, never 0."


def _training(values: list[dict[str, Any]]) -> tuple[str, str]:
    text = ", ".join(f"{v['optimiser']} {v['least']:.3g}" for v in values)
    return ("held" if all(v["least"] > 0 for v in values) else "wrong"), f"least distance along training: {text}."


def _witnesses(values: list[dict[str, Any]]) -> tuple[str, str]:
    n, right = sum(len(v["cases"]) for v in values), sum(v["as_expected"] for v in values)
    return ("held" if n == right else "limit"), f"{right} of {n} constructions do as expected."


def _half_margin(values: list[dict[str, Any]]) -> tuple[str, str]:
    below = [v for v in values if v["factor"] < 1]
    above = [v for v in values if v["factor"] > 1]
    holds = all(v["worst_is_right"] and v["random_right"] == 1 for v in below) and not any(
        v["worst_is_right"] for v in above
    )
    typical = ", ".join(f"{v['factor']:g}: {100 * v['random_right']:.0f} %" for v in values)
    return ("held" if holds else "wrong"), (
        f"worst direction right below half the margin and wrong above: {'yes' if holds else 'no'}; "
        f"random directions right at each multiple: {typical}."
    )


def _repeated(values: list[dict[str, Any]]) -> tuple[str, str]:
    text = "; ".join(
        f"{v['family']} {v['largest_gap']:.2g} alone, {v['least_gap_behind_another_token']:.2g} behind another token"
        for v in values
    )
    return "limit", (
        f"gap between n and n + 1 repeats, float64: {text}. With rotary positions only, such prompts collide up to "
        "rounding: the theorem takes position embeddings that are added to the tokens."
    )


_JUDGES: dict[str, Judge] = {
    "distances": _judged(_distances),
    "precision": _judged(_precision),
    "continuations": _judged(_continuations),
    "families": _judged(_families),
    "matched-next-tokens": _judged(_matched),
    "margins": _judged(_margins),
    "inversion": _judged(_inversion),
    "long-prompts": _judged(_all_exact),
    "vocabulary-share": _judged(_share),
    "time-by-layer": _judged(_all_exact),
    "stored-dtypes": _judged(_all_exact),
    "initialisation": _judged(_initialisation),
    "training": _judged(_training),
    "witnesses": _judged(_witnesses),
    "half-margin": _judged(_half_margin),
    "repeated-token": _judged(_repeated),
    "activations": _judged(_activations),
}


def _distance_figure(values: list[dict[str, Any]]) -> str:
    lengths: dict[str, list[tuple[float, float]]] = {}
    for v in values:
        lengths[v["key"]] = [(each["length"], each["least"]) for each in v["by_length"]]
    return chart(
        [Series(name=name, points=tuple(points)) for name, points in lengths.items()],
        x="tokens",
        y="least L2 distance",
        is_log_y=True,
        caption="Closest pair among prompts of one length, by layer.",
    )


def _time_figure(values: list[dict[str, Any]]) -> str:
    lengths = sorted({v["seq_len"] for v in values})
    return chart(
        [
            Series(name=f"{n} tokens", points=tuple((v["layer"], v["wall_ratio"]) for v in values if v["seq_len"] == n))
            for n in lengths
        ],
        x="layer",
        y="seconds over a plain pass",
        caption="Price of an inversion by layer and length.",
    )


def _training_figure(values: list[dict[str, Any]]) -> str:
    return chart(
        [
            Series(name=v["optimiser"].split(",")[0], points=tuple((p["step"], p["least"]) for p in v["path"]))
            for v in values
        ],
        x="step",
        y="least L2 distance",
        is_log_y=True,
        caption="Closest pair of prompts along training, float64.",
    )


def _bars(names: Iterable[str], key: str) -> Callable[[list[dict[str, Any]]], str]:
    """Return a figure of one value by the order of the records."""
    label = " ".join(names)

    def drawn(values: list[dict[str, Any]]) -> str:
        points = tuple((float(v["layer"]), float(v[key])) for v in values)
        return chart([Series(name=label, points=points)], x="layer", y=label, caption=f"{label} by layer.")

    return drawn


_FIGURES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "distances": _distance_figure,
    "margins": _bars(["least", "margin"], "least"),
    "time-by-layer": _time_figure,
    "training": _training_figure,
}
