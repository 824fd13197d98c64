"""The page of a reproduction: each claim of the paper, whether it held here, by which numbers and which command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol

from sipit.report.comparisons import ours, record_rows
from sipit.report.curves import figure
from sipit.report.judges import Kind, judge, worst
from sipit.report.page import number, page, table

Records = Sequence[dict[str, Any]]
_VERDICTS: dict[Kind, str] = {
    "held": "held",
    "limit": "held with this limit",
    "wrong": "did not hold",
    "open": "not tested here",
}
_MANY_ROWS = 24  # more are folded away
_FROM_4_BITS = ("smollm2-135m", "gemma-3-270m")  # pinned models: files of 4 bits, values held as floats
_OWN_MODELS = "tiny models of its own"


class Numbers(Protocol):
    """The paper's numbers, as `experiments.paper.PaperTable` has them."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def rows(self) -> tuple[tuple[str, tuple[float | None, ...]], ...]: ...


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

    @property
    def paper_table(self) -> Numbers | None: ...

    @property
    def caveat(self) -> str: ...

    @property
    def uses_model(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """An experiment on one model at one scale."""

    label: str
    records: Records
    kind: Kind
    says: str

    @property
    def values(self) -> list[dict[str, Any]]:
        return _values(self.records)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An experiment with all that was run of it."""

    claim: Claim
    runs: tuple[Run, ...]

    @property
    def kind(self) -> Kind:
        """The weakest of its runs' verdicts."""
        return worst([run.kind for run in self.runs])

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return _VERDICTS[self.kind]

    @property
    def sentences(self) -> list[str]:
        """What each run says, behind its model's name where there are several."""
        names = [f"{run.label}: " if len(self.runs) > 1 else "" for run in self.runs]
        return [f"{name}{_sentence(run.says)}" for name, run in zip(names, self.runs, strict=True)] or [
            "No record yet."
        ]


def judged(records: Records, claims: Mapping[str, Claim]) -> list[Judged]:
    """Return each experiment with its verdict; of several models and scales, each is judged by itself.

    Args:
        records: as `sipit reproduce` writes them.
        claims: by the name of the experiment, in the order of the page.
    """
    return [
        Judged(claim=one, runs=_runs(one, [r for r in records if r["experiment"] == name]))
        for name, one in claims.items()
    ]


def reproduction_page(records: Records, claims: Mapping[str, Claim]) -> str:
    """Return the page of all records of a folder. Arguments as for `judged`."""
    found = judged(records, claims)
    rows = "".join(map(_overview_row, found))
    head = "".join(f"<th>{name}</th>" for name in ("where", "claim", "here", "by"))
    counts = {kind: sum(one.kind == kind for one in found) for kind in _VERDICTS}
    lead = ", ".join(f"{n} {_VERDICTS[kind]}" for kind, n in counts.items() if n)
    models = sorted({r["model"] for r in records if claims[r["experiment"]].uses_model}) or ["models of our own"]
    body = [
        '<p class="lead">What <em>Language Models are Injective and Hence Invertible</em> (arXiv 2510.15511) claims, '
        f"tried on {escape(' and '.join(models))}: {lead}.</p>",
        f"<p class='soft'>{escape(_setting(models))}</p>",
        f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>',
        *map(_section, found),
    ]
    return page("What of the paper holds here", "\n".join(body), list(records))


def _runs(one: Claim, records: Records) -> tuple[Run, ...]:
    """Part the records of an experiment by model and scale, and judge each part."""
    parts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        parts.setdefault((record["model"], record["fingerprint"], record["scale"]), []).append(record)
    has_scales = len({scale for _, _, scale in parts}) > 1
    found = []
    for (model, _, scale), part in parts.items():
        name = model if one.uses_model else _OWN_MODELS
        kind, says = judge(one.name, _values(part))
        refused = [f"{r['key']} was refused: {r['values']['refused']}" for r in part if "refused" in r["values"]]
        if refused and kind == "held":
            kind = "limit"
        says = " ".join([_sentence(says), *(f"{each}." for each in refused)])
        found.append(Run(label=f"{name}, {scale}" if has_scales else name, records=part, kind=kind, says=says))
    return tuple(found)


def _values(records: Records) -> list[dict[str, Any]]:
    return [{**r["values"], "key": r["key"]} for r in records if "refused" not in r["values"]]


def _setting(models: Sequence[str]) -> str:
    rounded = [model for model in models if model in _FROM_4_BITS]
    weights = f" The weights of {' and '.join(rounded)} were rounded to 4 bits and are held as floats." * bool(rounded)
    return (
        "The paper's models and text are not those used here: each table says what its rows are of, the paper's first."
        f"{weights} Seconds compare within one column of ours only. All records are inside this page, as JSON."
    )


def _overview_row(one: Judged) -> str:
    claim = one.claim
    return (
        f'<tr><td><a href="#{claim.name}">{escape(claim.answers)}</a></td><td>{escape(_sentence(claim.claim))}</td>'
        f'<td class="{one.kind}">{one.verdict}</td><td>{_says(one)}</td></tr>'
    )


def _says(one: Judged) -> str:
    return "<br>".join(map(escape, one.sentences))


def _sentence(text: str) -> str:
    """Return a sentence with its first letter raised and a full stop; a name in lower case is left as it is."""
    end = "" if text.endswith(".") else "."
    return f"{text[:1].upper()}{text[1:]}{end}"


def _section(one: Judged) -> str:
    claim, runs = one.claim, one.runs
    parts = [
        f'<h2 id="{claim.name}">{escape(claim.name)}: {escape(claim.answers)}</h2>',
        f"<p>Claim: {escape(claim.claim)}.</p><p>Paper: {escape(claim.paper)}.</p>",
    ]
    if claim.caveat:
        parts.append(f"<p>Checked: {escape(claim.caveat)}.</p>")
    parts.append(f'<p>Here: <span class="{one.kind}">{one.verdict}</span>. {_says(one)}</p>')
    if not runs:
        return "".join([*parts, f"<pre>sipit reproduce {escape(claim.name)}</pre>"])
    if claim.paper_table is not None:
        parts.append(_beside(claim.paper_table, claim.name, runs))
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{escape(run.label)}</h3>")
        parts += [figure(claim.name, run.values), _records_table(claim.name, run), _made_by(claim, run)]
    return "".join(parts)


def _beside(numbers: Numbers, name: str, runs: Sequence[Run]) -> str:
    """Return the paper's rows, then ours, each with what it is of."""
    rows = [[f"paper: {label}", *map(_number, shown)] for label, shown in numbers.rows]
    for run in runs:
        rows += [[f"here: {run.label}, {label}", *map(_number, shown)] for label, shown in ours(name, run.values)]
    return table(["of", *numbers.columns], rows)


def _number(value: float | None) -> tuple[str, str]:
    """Return a cell with four digits, as many as the paper prints."""
    if value is None:
        return ("–", "")
    return (f"{value:,.4g}" if abs(value) < 1000 and value != int(value) else number(value), repr(value))


def _records_table(name: str, run: Run) -> str:
    """Return the records as rows; what is the same in all of them is said once above."""
    rows = record_rows(name, run.values)
    if not rows:
        return ""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    fixed = [c for c in columns if c != "of" and len(rows) > 1 and len({str(row[c]) for row in rows}) == 1]
    if len(fixed) == len(columns) - 1:
        fixed = []
    shown = [c for c in columns if c not in fixed]
    same = "; ".join(f"{c} = {_word(rows[0][c])}" for c in fixed)
    found = table(shown, [[row[c] for c in shown] for row in rows])
    if len(rows) > _MANY_ROWS:
        found = f"<details><summary>All {len(rows)} rows</summary>{found}</details>"
    return found + (f"<p class='soft'>The same in every row: {escape(same)}.</p>" if same else "")


def _word(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _made_by(one: Claim, run: Run) -> str:
    first = run.records[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] != 1 else ''}"
    commands = "".join(f"<pre>{escape(command)}</pre>" for command in dict.fromkeys(r["command"] for r in run.records))
    model = f"{first['model']}, {first['fingerprint'][:19]}…, {first['dtype']}" if one.uses_model else _OWN_MODELS
    return (
        f"{commands}<p class='soft'>{escape(model)} on {escape(first['device'])}, {threads}, torch "
        f"{escape(first['torch'])}, scale {first['scale']}, {sum(r['seconds'] for r in run.records):.0f} s in all.</p>"
    )
