"""The page of an audit: what states give away, what defences change, and what they cost, for someone who decides."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from sipit.report.page import Series, chart, heat_map, number, page, table

_SHOWN = 6  # examples
_FEW_TOKENS = 0.05  # of the tokens: less counts as hidden


def audit_page(record: dict[str, Any], examples: Sequence[dict[str, Any]], *, is_redacted: bool) -> str:
    """Return the page.

    Args:
        record: as `sipit audit` writes it to audit.json.
        examples: trials to show token by token.
        is_redacted: leave out every token's text and id.
    """
    cells = record["cells"]
    body = [
        f'<p class="lead">{escape(sentence(record))}</p>',
        f'<p class="soft">{escape(_setting(record))}</p>',
        "<h2>What comes back</h2>",
        _heat(cells),
        _table(cells),
        "<h2>Privacy against utility</h2>",
        _frontier(cells),
        "<h2>Token by token</h2>",
        *(_example(each, is_redacted) for each in examples[:_SHOWN]),
        "<h2>Method</h2>",
        _METHOD,
        "<h2>Limits</h2>",
        _LIMITS,
        "<h2>The command</h2>",
        f"<pre>{escape(record['command'])}</pre>",
    ]
    return page(f"What states of {record['model']} give away", "\n".join(body), {**record, "is_redacted": is_redacted})


def sentence(record: dict[str, Any]) -> str:
    """Return what a person can act on, in one or two sentences."""
    cells = record["cells"]
    bare = [cell for cell in cells if cell["defence"] == "none"]
    said = [_of_all(bare)] if len(bare) > 2 else [_of_one(cell) for cell in bare]
    defended = [cell for cell in cells if cell["defence"] != "none"]
    idle = [cell for cell in defended if cell["exact_prompts"] == cell["prompts"]]
    hiding = [cell for cell in defended if cell["exact_tokens"] <= _FEW_TOKENS * cell["tokens"]]
    idle_everywhere = [
        one for one in idle if all(other in idle for other in defended if _defence(other) == _defence(one))
    ]
    if idle_everywhere:
        said.append(f"{_named(idle_everywhere)} hid nothing")
    if hiding:
        cheapest = min(hiding, key=lambda cell: -(cell["agreement"] or 0.0))
        costs = (
            ""
            if cheapest["agreement"] is None
            else (f", at the price of another next token at {100 * (1 - cheapest['agreement']):.0f} % of positions")
        )
        said.append(f"{_defence(cheapest)} at {_place(cheapest).lower()} left at most 1 token in 20 readable{costs}")
    middle = [cell for cell in defended if cell not in idle and cell not in hiding]
    if middle:
        worst = max(middle, key=lambda cell: cell["exact_tokens"] / cell["tokens"])
        part = 100 * worst["exact_tokens"] / worst["tokens"]
        said.append(f"under {_defence(worst)} {part:.0f} % of tokens still came back")
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}." if text else "Nothing was tried."


def _of_one(cell: dict[str, Any]) -> str:
    return (
        f"{_place(cell).lower()} in {cell['stored_as']} give back {_share(cell)} of prompts whole "
        f"({cell['exact_prompts']} of {cell['prompts']}) in {cell['seconds']:.2g} s each"
    )


def _of_all(cells: Sequence[dict[str, Any]]) -> str:
    """Return the least and the most that several places give back."""
    ordered = sorted(cells, key=lambda cell: cell["exact_prompts"] / cell["prompts"])
    seconds = sorted(cell["seconds"] for cell in cells)
    time = f"in {seconds[0]:.2g} to {seconds[-1]:.2g} s each"
    least, most = _share(ordered[0]), _share(ordered[-1])
    if least == most:
        whole = f"{sum(cell['exact_prompts'] for cell in cells)} of {sum(cell['prompts'] for cell in cells)}"
        return f"states at each of {len(cells)} places give back {most} of prompts whole ({whole}) {time}"
    return (
        f"states at {len(cells)} places give back {least} ({_place(ordered[0]).lower()}) to {most} "
        f"({_place(ordered[-1]).lower()}) of prompts whole, {time}"
    )


def _place(cell: dict[str, Any]) -> str:
    where = "the final norm" if cell["site"] == "final" else f"block {cell['layer']}"
    kind = {"block": "States", "final": "States"}.get(cell["site"], f"{cell['site']} values")
    return f"{kind} after {where}" if cell["site"] in ("block", "final") else f"{kind} at {where}"


def _defence(cell: dict[str, Any]) -> str:
    return cell["defence"] if not cell["strength"] else f"{cell['defence']} {cell['strength']:g}"


def _named(cells: Sequence[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(map(_defence, cells)))


def _share(cell: dict[str, Any]) -> str:
    return f"{100 * cell['exact_prompts'] / cell['prompts']:.0f} %"


def _setting(record: dict[str, Any]) -> str:
    threads = f"{record['threads']} thread{'s' if record['threads'] != 1 else ''}"
    return (
        f"Model {record['model']} ({record['fingerprint'][:19]}…), {record['dtype']} weights on {record['device']}, "
        f"{threads}, sipit {record['sipit']}, torch {record['torch']}. Intervals are Wilson's, 95 %."
    )


def _heat(cells: Sequence[dict[str, Any]]) -> str:
    rows = list(dict.fromkeys((cell["site"], cell["layer"], cell["stored_as"]) for cell in cells))
    columns = list(dict.fromkeys(map(_defence, cells)))
    values = {
        (rows.index((cell["site"], cell["layer"], cell["stored_as"])), columns.index(_defence(cell))): (
            cell["exact_tokens"] / cell["tokens"],
            f"{100 * cell['exact_tokens'] / cell['tokens']:.0f} %",
        )
        for cell in cells
    }
    names = [f"{site} {layer}, {stored}" for site, layer, stored in rows]
    return f"<p>Share of tokens that came back, by place and defence.</p>{heat_map(names, columns, values)}"


def _table(cells: Sequence[dict[str, Any]]) -> str:
    columns = (
        *("layer", "site", "stored as", "defence", "prompts whole", "interval", "tokens", "verdicts", "s a prompt"),
        *("× a plain pass", "KL, nats a token", "next token kept"),
    )
    rows = [
        [
            *(cell["layer"], cell["site"], cell["stored_as"], _defence(cell)),
            (f"{cell['exact_prompts']} of {cell['prompts']}", cell["exact_prompts"] / cell["prompts"]),
            (f"{100 * cell['low']:.0f} to {100 * cell['high']:.0f} %", cell["low"]),
            (f"{100 * cell['exact_tokens'] / cell['tokens']:.0f} %", cell["exact_tokens"] / cell["tokens"]),
            ", ".join(f"{n} {name}" for name, n in cell["verdicts"].items()),
            cell["seconds"],
            cell["wall_ratio"],
            (number(cell["kl"]), -1 if cell["kl"] is None else cell["kl"]),
            ("–", -1) if cell["agreement"] is None else (f"{100 * cell['agreement']:.0f} %", cell["agreement"]),
        ]
        for cell in cells
    ]
    return table(columns, rows)


def _frontier(cells: Sequence[dict[str, Any]]) -> str:
    known = [cell for cell in cells if cell["agreement"] is not None]
    names = list(dict.fromkeys(cell["defence"] for cell in known))
    series = [
        Series(
            name=name,
            is_joined=False,
            points=tuple(
                (100 * cell["agreement"], 100 * cell["exact_tokens"] / cell["tokens"])
                for cell in known
                if cell["defence"] == name
            ),
        )
        for name in names
    ]
    caption = (
        "Right and low is best: the model's answers kept, and few tokens given away. Marks of one place stand side by "
        "side, the rightmost where it is."
    )
    return chart(
        series, x="next tokens that stay the same, %", y="tokens given away, %", within=(0, 100), caption=caption
    )


def _example(trial: dict[str, Any], is_redacted: bool) -> str:
    right = f"{trial['exact_tokens']} of {trial['tokens']} tokens right"
    cell = trial["cell"].removesuffix(":0")
    head = f"<h3>{escape(cell)}: prompt {trial['prompt'] + 1}, {escape(trial['verdict'])}, {right}</h3>"
    if is_redacted:
        return f"{head}<p class='soft'>Tokens are left out of this page.</p>"
    spans = []
    for one in trial["shown"]:
        numbers = [f"distance {number(one['distance'])}"]
        numbers += [f"nearest other {number(one['runner_up'])}"] if one["runner_up"] is not None else []
        numbers += [f"posterior {one['posterior']:.2f}"] if one["posterior"] is not None else []
        text = "?" if one["token"] is None else one["token"].replace("\n", "⏎")
        kind = "token" if one["is_right"] else "token miss"
        spans.append(f'<span class="{kind}" title="{escape(", ".join(numbers))}">{escape(text)}</span>')
    return f"{head}<p>{''.join(spans)}</p>"


_METHOD = """<p>Each prompt is run once by an ordinary forward pass; its states are rounded as stored, then defended.
The attacker knows the model, the place and the defence, but not the draw of its noise nor its key. Where nothing but
rounding stands between, the prompt is sought exactly, and no token is accepted unless running the model on it gives
the observed row within what arithmetic explains. Behind noise the most probable prompt is sought under the noise's own
model. A prompt counts as given away when every token of it is right. What a defence costs is measured by letting the
rest of the model go on from the defended rows: KL divergence of its next-token probabilities, and how often its most
likely token stays the same. Hold the pointer over a token for its distance and that of the nearest other token.</p>"""

_LIMITS = """<p>A stronger attacker may do better than this one behind noise; what was found is a lower bound on what
leaks. Prompts of other text, other lengths and other models may fare otherwise. Exactness says nothing of the meaning
that a partly right answer still gives away.</p>"""
