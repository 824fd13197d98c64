"""Pages stand alone, show what their records say, and escape what users wrote."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from sipit.report.audit import audit_page, sentence
from sipit.report.page import Series, chart, heat_map, number, table
from tests.audit_records import CELL, HIDDEN, NOISY, RECORD, TRIAL


def test_a_page_stands_alone_and_holds_its_record() -> None:
    text = audit_page(RECORD, [TRIAL], is_redacted=False)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "http" not in text
    inside = re.search(r'<script type="application/json" id="record">(.*?)</script>', text, re.S)
    assert inside is not None
    assert json.loads(inside[1])["cells"] == RECORD["cells"]
    assert "<script>secret" not in text
    assert "&lt;script&gt;secret" in text
    assert "tiny <b>" not in text.replace(inside[1], "")


def test_a_redacted_page_holds_no_token() -> None:
    assert "secret" in audit_page(RECORD, [TRIAL], is_redacted=False)
    assert "secret" not in audit_page(RECORD, [TRIAL], is_redacted=True)


def test_the_sentence_says_what_came_back_what_changed_nothing_and_what_hides() -> None:
    text = sentence({**RECORD, "cells": [CELL, {**CELL, "defence": "rounding", "strength": 8.0}, NOISY, HIDDEN]})
    assert text.startswith("States after block 5 in float32 give back 100 % of prompts whole (4 of 4) in 0.2 s each")
    assert "rounding 8 hid nothing" in text
    assert "gaussian 4 at states after block 5 left at most 1 token in 20 readable" in text
    assert "at the price of another next token at 90 % of positions" in text
    assert "under gaussian 0.5 50 % of tokens still came back" in text


def test_a_defence_that_hides_something_somewhere_did_not_change_nothing() -> None:
    elsewhere = {**NOISY, "layer": 9, "exact_prompts": 4, "exact_tokens": 80}
    text = sentence({**RECORD, "cells": [CELL, NOISY, elsewhere]})
    assert "hid nothing" not in text
    assert "under gaussian 0.5 50 % of tokens still came back" in text


def test_tables_sort_by_numbers_and_heat_maps_show_shares() -> None:
    text = table(["a", "b"], [[1, ("2 of 3", 0.5)], [1000.5, "<i>"], [None, True]])
    assert 'data-value="0.5">2 of 3' in text
    assert "&lt;i&gt;" in text
    shaded = heat_map(["r"], ["c", "d"], {(0, 0): (0.25, "25 %")})
    assert "var(--heat) 25%" in shaded
    assert shaded.count("<td") == 2


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (3, "3"), (1234.4, "1,234"), (0.00012345, "0.000123"), (2.0, "2")]
)
def test_numbers_have_as_many_digits_as_a_reader_needs(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("is_log", [False, True])
def test_points_lie_within_the_axes_and_rise_with_their_values(is_log: bool) -> None:
    points = tuple((10.0**k, 10.0 ** (k / 2)) for k in range(-3, 4))
    text = chart([Series(name="a&b", points=points)], x="x", y="y", is_log_x=is_log, is_log_y=is_log, caption="c")
    figure = ElementTree.fromstring(text)
    line = figure.find(".//polyline")
    assert line is not None
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert all(0 < a < 640 and 0 < b < 340 for a, b in places)
    assert [a for a, _ in places] == sorted(a for a, _ in places)
    assert [b for _, b in places] == sorted((b for _, b in places), reverse=True)
    assert {each.text for each in figure.iter("text")} >= {"x", "y", "a&b"}


@pytest.mark.parametrize("points", [(), ((1.0, 1.0),), ((-1.0, 2.0),)])
def test_few_points_or_none_are_no_trouble(points: tuple[tuple[float, float], ...]) -> None:
    text = chart([Series(name="one", points=points)], x="x", y="y", is_log_x=True, caption="c")
    ElementTree.fromstring(text)
    assert ("nothing to draw" in text) == (points != ((1.0, 1.0),))


def test_many_places_are_summed_up_and_the_least_and_the_most_named() -> None:
    cells = [{**CELL, "layer": layer, "prompts": 10, "exact_prompts": 10} for layer in (1, 5, 29)]
    text = sentence({**RECORD, "cells": cells})
    assert "at each of 3 places give back 100 % of prompts whole (30 of 30)" in text
    text = sentence({**RECORD, "cells": [*cells, {**cells[0], "layer": 30, "exact_prompts": 4}]})
    assert "at 4 places give back 40 % (states after block 30) to 100 % (states after block" in text


def test_many_series_are_told_apart_where_their_points_coincide() -> None:
    series = [Series(name=f"s{n}", is_joined=False, points=((50.0, 50.0),)) for n in range(9)]
    text = chart(series, x="x", y="y", within=(0, 100), caption="")
    marks = re.findall(r"<(?:circle|rect|path) [^>]*var\(--[^>]*>", text)
    assert len(marks) == 18  # at the point and at the name
    assert len(set(marks)) == 18
    places = re.compile(r'(cx|cy|x|y|d)="[^"]*"')
    assert len({places.sub("", mark) for mark in marks}) >= 9 - 1
