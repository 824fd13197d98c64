"""The page: what a visitor chooses on the left, what comes back on the right. Served to this machine alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sipit.errors import OptionError, SipitError
from sipit.models import LanguageModel
from sipit.observations import SITES
from sipit.web.recovering import FINAL, Asked, recovering

_AT_ONCE = 4  # visitors whose inversions run at the same time
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
_STYLE = """
.evidence{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
.evidence th,.evidence td{padding:.15rem .6rem;text-align:right;border:0;
border-bottom:1px solid var(--border-color-primary)}
.evidence th:nth-child(2),.evidence td:nth-child(2){text-align:left}
.evidence code{white-space:pre-wrap}.recovered{white-space:pre-wrap;padding:.6rem;font-size:1.05rem}
"""
_ABOUT = """# What do hidden states give away?
Write a text, or drop a file of states. The text is run through the model once and forgotten; what is left is a row of
numbers for each token, and from these the text is recovered: a token is accepted when its row comes out again within
the tolerance that arithmetic leaves. Nothing leaves this machine.
"""


@contextmanager
def serving(lm: LanguageModel, *, port: int | None = None) -> Iterator[str]:
    """Serve the page for a model, to this machine alone, as long as the context is open; give its address.

    Args:
        lm: the model.
        port: to listen on; None: the first free one from 7860.

    Raises:
        OptionError: gradio is not installed, or the port is taken.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import gradio
    except ImportError as error:
        raise OptionError("--web needs the package gradio; install it with pip install 'sipit[web]'") from error
    with TemporaryDirectory(prefix="sipit-web-") as name:
        os.environ["GRADIO_TEMP_DIR"] = name  # certificates and dropped files hold prompts: they go with the server
        page = _page(gradio, lm, Path(name))
        fonts = ["system-ui", "sans-serif"]
        try:
            _, address, _ = page.queue(default_concurrency_limit=_AT_ONCE).launch(
                server_name="127.0.0.1",
                server_port=port,
                share=False,
                quiet=True,
                ssr_mode=False,
                prevent_thread_lock=True,
                footer_links=[],
                theme=gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
                css=_STYLE,
            )
        except OSError as error:
            raise OptionError(f"port {port} is taken; name another one with --port, or none") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def _page(gradio: Any, lm: LanguageModel, folder: Path) -> Any:
    def recover(text: str, file: str | None, layer: str, site: Any, noise: float) -> Iterator[tuple[Any, ...]]:
        asked = Asked(text=text, file=None if file is None else Path(file), layer=layer, site=site, noise=noise)
        hidden = gradio.DownloadButton(visible=False)
        try:
            for shown in recovering(lm, asked, folder):
                done = shown.certificate
                yield (
                    shown.status,
                    shown.tokens,
                    hidden if done is None else gradio.DownloadButton(value=str(done), visible=True),
                )
        except SipitError as error:
            yield f"refused: {error}", "", hidden

    with gradio.Blocks(title="sipit", analytics_enabled=False) as page:
        gradio.Markdown(_ABOUT)
        with gradio.Row():
            with gradio.Column():
                text = gradio.Textbox(label="Text", lines=4, elem_id="text")
                file = gradio.File(label="or a file of states", type="filepath", height=140, elem_id="file")
                layer = gradio.Dropdown(
                    [*map(str, range(1, lm.n_layers + 1)), FINAL],
                    value=str(max(1, lm.n_layers // 2)),
                    label=f"Layer: blocks of {lm.name} run, of {lm.n_layers}",
                    elem_id="layer",
                )
                site = gradio.Dropdown(list(SITES), value="block", label="Site: what leaked", elem_id="site")
                noise = gradio.Slider(
                    0.0, 1.0, value=0.0, step=0.01, label="Noise, over the length of a row", elem_id="noise"
                )
                start = gradio.Button("Recover", variant="primary", elem_id="recover")
            with gradio.Column():
                status = gradio.Markdown(elem_id="status")
                tokens = gradio.HTML(elem_id="tokens")
                with gradio.Row(elem_id="certificate"):
                    certificate = gradio.DownloadButton("Certificate", visible=False)
        start.click(recover, [text, file, layer, site, noise], [status, tokens, certificate])
    return page
