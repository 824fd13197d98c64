"""The figures of a reproduction, from the values of one model at one scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sipit.report.page import Series, chart

Values = Sequence[dict[str, Any]]


def figure(name: str, values: Values) -> str:
    """Return the figure of an experiment; nothing where it has none."""
    return _FIGURES[name](values) if name in _FIGURES else ""


def _distances(values: Values) -> str:
    return chart(
        [
            Series(name=_place(v), points=tuple((each["length"], each["least"]) for each in v["by_length"]))
            for v in values
        ],
        x="tokens",
        y="least L2 distance",
        is_log_y=True,
        caption="Closest pair among prompts of one length, by layer.",
    )


def _place(v: dict[str, Any]) -> str:
    return "after the final norm" if v["site"] == "final" else f"layer {v['layer']}"


def _margins(values: Values) -> str:
    return chart(
        _by_site(values, lambda v: (v["layer"], v["least"])),
        x="layer",
        y="least margin, L2",
        is_log_y=True,
        caption="Distance between the two nearest next tokens, the least over all prefixes.",
    )


def _by_site(values: Values, point: Callable[[dict[str, Any]], tuple[float, float]]) -> list[Series]:
    blocks = [point(v) for v in values if v["site"] == "block"]
    finals = [point(v) for v in values if v["site"] == "final"]
    return [
        Series(name="after a block", points=tuple(blocks)),
        Series(name="after the final norm", points=tuple(finals), is_joined=False),
    ]


def _time(values: Values) -> str:
    lengths = sorted({v["seq_len"] for v in values})
    return chart(
        [
            *(
                Series(
                    name=f"{n} tokens",
                    points=tuple(
                        (v["layer"], v["seconds"]) for v in values if v["seq_len"] == n and v["site"] == "block"
                    ),
                )
                for n in lengths
            ),
            Series(
                name="after the final norm",
                points=tuple((v["layer"], v["seconds"]) for v in values if v["site"] == "final"),
                is_joined=False,
            ),
        ],
        x="layer",
        y="seconds a prompt",
        is_log_y=True,
        caption="Time of an inversion by layer and length.",
    )


def _training(values: Values) -> str:
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


_FIGURES: dict[str, Callable[[Values], str]] = {
    "distances": _distances,
    "margins": _margins,
    "time-by-layer": _time,
    "training": _training,
}
