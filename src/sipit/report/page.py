"""One self-contained HTML page: sections, sortable tables, figures in plain SVG, records inside as JSON. No network.

Colours are Okabe and Ito's (2008), told apart by the colour-blind; every series has a mark of its own as well. The
page follows the reader's light or dark setting, and prints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_STYLE = """
:root{--ink:#1b1b1b;--paper:#fff;--soft:#5c5c5c;--line:#d5d5d5;--wash:#f4f4f2;--good:#00694d;--warn:#8a5500;
--bad:#b34700;--link:#0b62a0;--heat:#e8915a;--a:#0072b2;--b:#d55e00;--c:#009e73;--d:#cc79a7;--e:#e69f00;--f:#56b4e9}
@media (prefers-color-scheme:dark){:root{--ink:#ececec;--paper:#16181b;--soft:#a9a9a9;--line:#3a3d42;--wash:#1f2226;
--good:#2fc79a;--warn:#f0b93a;--bad:#ff9757;--link:#7cc4f2;--heat:#8f3d00;--a:#56b4e9;--b:#ff8c42;--c:#2fc79a;
--d:#e39ac4;--e:#f0b93a;--f:#8fd0f5}}
*{box-sizing:border-box}body{margin:0 auto;max-width:66rem;padding:1.5rem 1.2rem 4rem;background:var(--paper);
color:var(--ink);font:1rem/1.55 system-ui,sans-serif;overflow-wrap:break-word}a{color:var(--link)}
h1{font-size:1.7rem;line-height:1.25}h2{font-size:1.25rem;margin-top:2.4rem;border-bottom:1px solid var(--line);
padding-bottom:.25rem}h3{font-size:1.05rem}.lead{font-size:1.12rem}.soft,figcaption{color:var(--soft);
font-size:.92rem}figure{margin:1.2rem 0}.wide{overflow-x:auto;margin:.8rem 0}table{border-collapse:collapse;
font-variant-numeric:tabular-nums;font-size:.92rem}th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);
text-align:left;vertical-align:top}th.n,td.n{text-align:right}td.n{white-space:nowrap}td.t{min-width:15rem}
.wide td:first-child:not(.n){min-width:10rem}th[data-sort]{cursor:pointer;user-select:none;vertical-align:bottom}
th[data-sort]:after{content:"\\a0\\2195";color:var(--soft)}th[data-sort=up]:after{content:"\\a0\\2191"}
th[data-sort=down]:after{content:"\\a0\\2193"}summary{cursor:pointer;color:var(--link)}
code,pre{font-family:ui-monospace,monospace;font-size:.88em;background:var(--wash)}
pre{padding:.7rem;overflow-x:auto}svg{display:block;max-width:100%;min-width:33rem;height:auto}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}
.held,.limit,.open,.wrong{font-weight:600}.held{color:var(--good)}.limit{color:var(--warn)}.open{color:var(--soft)}
.wrong{color:var(--bad)}.held:before{content:"\\2713\\a0"}.limit:before{content:"\\2248\\a0"}
.wrong:before{content:"\\2717\\a0"}.open:before{content:"\\2013\\a0"}
.token{display:inline-block;padding:0 .2rem;margin:.1rem;border:1px solid var(--line);border-radius:.2rem;
background:var(--wash);white-space:pre}.token.miss{border-color:var(--b);text-decoration:line-through}
@media (min-width:60rem){.wide td:first-child:not(.n){min-width:15rem}}
@media (max-width:44rem){.claims thead{display:none}.claims tr{display:block;border-bottom:1px solid var(--line);
padding:.6rem 0}.claims td{display:block;border:0;padding:.1rem 0}}
@media print{html{font-size:11px}body{max-width:none}.wide{overflow:visible}svg,.wide td:first-child:not(.n),td.t{
min-width:0}th[data-sort]:after{content:none}h2,h3{break-after:avoid}
figure,tr{break-inside:avoid}}
"""

# Numbers sort before words, and empty cells come last whichever way the rest runs.
_SCRIPT = """
const value=(row,i)=>{const cell=row.children[i],text=(cell.dataset.value??cell.textContent).trim();
return text===""?null:isNaN(text)?text:Number(text)};
const order=(p,q)=>typeof p!==typeof q?(typeof p==="number"?-1:1):typeof p==="number"?p-q:
p.localeCompare(q,undefined,{numeric:true});
const sort=head=>{const way=head.dataset.sort==="up"?"down":"up",sign=way==="up"?1:-1,
heads=[...head.parentNode.children],i=heads.indexOf(head),body=head.closest("table").tBodies[0];heads.forEach(each=>{each.dataset.sort="";
each.removeAttribute("aria-sort")});head.dataset.sort=way;head.setAttribute("aria-sort",way==="up"?"ascending":
"descending");[...body.rows].sort((x,y)=>{const p=value(x,i),q=value(y,i);return p===null||q===null?
(p===null)-(q===null):sign*order(p,q)}).forEach(row=>body.append(row))};
for(const head of document.querySelectorAll("th[data-sort]")){head.addEventListener("click",()=>sort(head));
head.addEventListener("keydown",event=>{if(event.key==="Enter")sort(head)})}
"""

_RIGHT_SET, _WORDY = ' class="n"', ' class="t"'
_LONG = 24  # letters: a cell of more gets room
_MARKS = ("a", "b", "c", "d", "e", "f")  # a colour and a shape for each series, in turn
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 340, 64, 150, 14, 46
_MARK = 10.0  # a mark and the room around it
_LEAST_GAP = 14.0  # between the labels of two lines


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one line or cloud."""

    name: str
    points: tuple[tuple[float, float], ...]
    is_joined: bool = True


def page(title: str, body: str, record: Any) -> str:
    """Return a whole page, with the records that its numbers come from inside."""
    inside = json.dumps(record, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n'
        f'<h1>{escape(title)}</h1>\n{body}\n<script type="application/json" id="record">{inside}</script>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table that its reader can sort; numbers are set right. A cell may be (text, number to sort by)."""
    is_number = [any(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    head = "".join(
        f'<th data-sort="" tabindex="0"{_RIGHT_SET * right}>{escape(name)}</th>'
        for name, right in zip(columns, is_number, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | tuple) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if not _is_number(value):
        text = "" if value is None else str(value)
        return f"<td{_WORDY * (len(text) > _LONG)}>{escape(text)}</td>"
    text, key = value if isinstance(value, tuple) else (number(value), repr(value))
    return f'<td{_RIGHT_SET} data-value="{key}">{escape(str(text))}</td>'


def number(value: float | None) -> str:
    """Return a number with as many digits as a reader needs."""
    if value is None:
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6) or 100 <= abs(value) < 1e6:
        return f"{round(value):,}"
    return f"{value:.3g}"


def heat_map(rows: Sequence[str], columns: Sequence[str], values: dict[tuple[int, int], tuple[float, str]]) -> str:
    """Return a table of shares from 0 to 1, each cell as dark as its share and with its number. (row, column) → …"""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = []
    for i, name in enumerate(rows):
        cells = "".join(_shade(values.get((i, j))) for j in range(len(columns)))
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _shade(value: tuple[float, str] | None) -> str:
    if value is None:
        return "<td></td>"
    share, text = value
    return (
        f'<td class="n" style="background:color-mix(in srgb,var(--heat) {100 * share:.0f}%,transparent)">'
        f"{escape(text)}</td>"
    )


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    is_log_x: bool = False,
    is_log_y: bool = False,
    within: tuple[float, ...] = (),
    caption: str = "",
) -> str:
    """Return a figure of lines or clouds, each with a colour, a mark and its name at its end; both axes are named.

    Args:
        within: values that the upright axis reaches, whatever the points are.
    """
    drawn = [
        Series(
            name=one.name,
            is_joined=one.is_joined,
            points=tuple(p for p in one.points if (p[0] > 0 or not is_log_x) and (p[1] > 0 or not is_log_y)),
        )
        for one in series
    ]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return f"<figure><figcaption>{escape(caption)} (nothing to draw)</figcaption></figure>"
    across = _Axis([p[0] for one in drawn for p in one.points], is_log_x, _LEFT, _WIDTH - _RIGHT)
    up = _Axis([*within, *(p[1] for one in drawn for p in one.points)], is_log_y, _HEIGHT - _BOTTOM, _TOP)
    parts = [across.lines(is_across=True), up.lines(is_across=False)]
    labels: list[tuple[float, int, str]] = []
    taken: dict[tuple[int, int], int] = {}  # where marks of single points stand, and how many side by side
    for n, one in enumerate(drawn):
        colour, places = _MARKS[n % len(_MARKS)], [(across.at(p[0]), up.at(p[1])) for p in one.points]
        if one.is_joined and len(places) > 1:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="var(--{colour})" stroke-width="2"/>')
        if not one.is_joined:
            places = [_beside(taken, a, b) for a, b in places]
        parts += [_mark(n, a, b, colour) for a, b in places]
        labels.append((places[-1][1], n, one.name))
    parts += _labels(labels)
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y)}</text>'
    )
    return (
        f'<figure><div class="wide"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        f'aria-label="{escape(caption)}">'
        f"{''.join(parts)}</svg></div><figcaption>{escape(caption)}</figcaption></figure>"
    )


class _Axis:
    """Where values lie along one axis, and its ticks."""

    def __init__(self, values: Sequence[float], is_log: bool, start: float, end: float) -> None:
        self._is_log = is_log
        scaled = [math.log10(v) if is_log else v for v in values]
        low, high = min(scaled), max(scaled)
        room = 0.04 * (high - low) or 0.5
        self._low, self._high = low - room, high + room
        if not is_log and low >= 0 and low < 0.3 * high:
            self._low = 0.0
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """Return the place of a value."""
        scaled = math.log10(value) if self._is_log else value
        return self._start + (scaled - self._low) / (self._high - self._low) * (self._end - self._start)

    def lines(self, *, is_across: bool) -> str:
        """Return grid lines with their numbers."""
        found = []
        foot, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        for value in self._ticks():
            place = self.at(value)
            text = f"{value:g}"
            if is_across:
                found.append(
                    f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{foot}" stroke="var(--line)"/>'
                    f'<text x="{place:.1f}" y="{foot + 16}" text-anchor="middle">{text}</text>'
                )
            else:
                found.append(
                    f'<line x1="{_LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}" stroke="var(--line)"/>'
                    f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{text}</text>'
                )
        return "".join(found)

    def _ticks(self) -> list[float]:
        if self._is_log:
            first, last = math.ceil(self._low), math.floor(self._high)
            if last > first:
                step = max(1, (last - first) // 5)
                return [10.0**k for k in range(first, last + 1, step)]
            # Within one power of ten the ticks are round numbers too, though not evenly apart.
            return self._round_ticks(10.0**self._low, 10.0**self._high)
        return self._round_ticks(self._low, self._high)

    def _round_ticks(self, low: float, high: float) -> list[float]:
        """Return three to seven round numbers between two, evenly apart."""
        span = high - low
        power = 10.0 ** math.floor(math.log10(span / 4))
        gap = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 6)
        return [float(f"{k * gap:.6g}") for k in range(math.ceil(low / gap), math.floor(high / gap) + 1)]


def _mark(n: int, a: float, b: float, colour: str) -> str:
    """Return the mark of the n-th series at a place: circle, square, triangle, diamond, cross, ring."""
    fill = f'fill="var(--{colour})"'
    shapes = (
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" {fill}/>',
        f'<rect x="{a - 4:.1f}" y="{b - 4:.1f}" width="8" height="8" {fill}/>',
        f'<path d="M{a:.1f} {b - 5:.1f}l5 9h-10z" {fill}/>',
        f'<path d="M{a:.1f} {b - 5:.1f}l5 5-5 5-5-5z" {fill}/>',
        f'<path d="M{a - 4:.1f} {b - 4:.1f}l8 8m0-8l-8 8" stroke="var(--{colour})" stroke-width="2.5"/>',
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="none" stroke="var(--{colour})" stroke-width="2"/>',
    )
    return shapes[(n + n // len(shapes)) % len(shapes)]  # once the colours are through, each meets another shape


def _beside(taken: dict[tuple[int, int], int], a: float, b: float) -> tuple[float, float]:
    """Return a place left of the marks that stand at one already."""
    near = (round(a / _MARK), round(b / _MARK))
    before = taken[near] = taken.get(near, -1) + 1
    return a - _MARK * before, b


def _labels(labels: Sequence[tuple[float, int, str]]) -> list[str]:
    """Return the marks and names of series beside their ends, moved apart where they would overlap."""
    found: list[str] = []
    last, left = -math.inf, _WIDTH - _RIGHT + 14
    for place, n, name in sorted(labels):
        last = max(place, last + _LEAST_GAP)
        colour = _MARKS[n % len(_MARKS)]
        found.append(_mark(n, left, last, colour))
        found.append(f'<text x="{left + 9}" y="{last + 4:.1f}">{escape(name)}</text>')
    return found
