"""One visitor's inversion, from what the page holds to what it shows, step by step. Knows no web library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import mkdtemp

import torch

from sipit.errors import InputError, OptionError
from sipit.inversion import (
    Inversion,
    NoiseModel,
    PositionEvidence,
    Progress,
    holds_last_alone,
    invert,
    observation_at,
    search_events,
    write_certificate,
)
from sipit.models import LanguageModel
from sipit.observations import OF_ONE_LAYER, Observation, Site

FINAL = "final"  # the layer behind the final norm, as the command line names it
_SEED = 0  # of the noise that the page adds


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a visitor asks for."""

    text: str
    file: Path | None  # states in place of a text
    layer: str  # blocks run, or FINAL
    site: Site
    noise: float  # length of the noise added to each row, over the usual length of one


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the page shows at one moment."""

    status: str
    tokens: str  # HTML
    certificate: Path | None = None


def recovering(lm: LanguageModel, asked: Asked, folder: Path) -> Iterator[Shown]:
    """Yield what to show after each packed pass, and at last the verdict with its certificate.

    Args:
        lm: the model.
        asked: what to invert, and as what.
        folder: where the certificate is to lie, in a folder of its own.

    Raises:
        SipitError: it cannot be inverted as asked, in one sentence.
    """
    seen, noise = _observed(lm, asked)
    yield Shown(
        status=f"{seen.n_sought} rows of {seen.d_model} numbers, {seen.cut}; the text is not looked at", tokens=""
    )
    if noise is not None or holds_last_alone(seen):
        yield from _told(invert(lm, seen, noise=noise or 0.0), folder)
        return
    for event in search_events(lm, seen):
        if isinstance(event, Progress):
            yield Shown(
                status=f"{len(event.input_ids)} of {event.seq_len} tokens, {event.n_checked} candidates tried, "
                f"{event.n_passes} passes, {event.seconds:.1f} s",
                tokens=_table(event.positions),
            )
        else:
            yield from _told(event, folder)


def _observed(lm: LanguageModel, asked: Asked) -> tuple[Observation, NoiseModel | None]:
    site: Site = "final" if asked.layer == FINAL and asked.site == "block" else asked.site
    layer = None if asked.layer == FINAL or site in OF_ONE_LAYER else int(asked.layer)
    if asked.file is not None:
        try:
            return observation_at(lm, asked.file), None
        except (InputError, OptionError):  # it does not say what it is: the page does
            return observation_at(lm, asked.file, layer=layer, site=site), None
    if not asked.text.strip():
        raise InputError("there is no text; write one, or drop a file of states")
    seen = lm.capture(asked.text, layer=layer, site=site)
    if not asked.noise:
        return seen, None
    rows = seen.states.float()
    usual = float((rows[1:] if len(rows) > 1 else rows).norm(dim=1).median())
    sigma = asked.noise * usual / math.sqrt(seen.d_model)
    generator = torch.Generator().manual_seed(_SEED)
    noisy = rows + sigma * torch.randn(rows.shape, generator=generator).to(rows)
    return Observation(states=noisy, layer=seen.layer, site=seen.site), NoiseModel.gaussian(sigma)


def _told(found: Inversion, folder: Path) -> Iterator[Shown]:
    path = Path(mkdtemp(dir=folder)) / "certificate.json"
    write_certificate(found, path)
    said = found.summary().removeprefix(found.verdict)
    status = f"**{found.verdict}**{said}; {found.seconds:.2f} s, {found.wall_ratio:.1f} times a plain pass"
    yield Shown(status=status, tokens=_text(found) + _table(found.positions), certificate=path)


def _text(found: Inversion) -> str:
    return f'<pre class="recovered">{escape(found.text or "")}</pre>'


def _table(positions: tuple[PositionEvidence, ...]) -> str:
    """Return the evidence of each position, as rows of a table."""
    heads = ("", "token", "distance", "tolerance", "runner-up", "checked")
    rows = [
        (
            str(place),
            f"<code>{escape(repr(one.token)[1:-1] if one.token is not None else str(one.token_id))}</code>",
            f"{one.distance:.3g}",
            f"{one.tolerance:.3g}",
            "" if one.runner_up is None else f"{one.runner_up:.3g}",
            str(one.n_checked) if one.posterior is None else f"posterior {one.posterior:.3f}",
        )
        for place, one in enumerate(positions)
    ]
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="evidence"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
