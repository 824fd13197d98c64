"""Where states leaked: a layer and a site, printed and compared in this one place."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Site = Literal[
    "block",
    "final",
    "kv",
    "keys",
    "values",
    "logits",
    "log_probs",
    "block_unit",
    "block_centred",
    "final_unit",
]
SITES: tuple[Site, ...] = get_args(Site)
OF_ONE_LAYER: tuple[Site, ...] = ("final", "logits", "log_probs", "final_unit")  # those behind the last block


class Cut(NamedTuple):
    """A place in a model where states are observed; equal to the plain pair (layer, site)."""

    layer: int  # blocks run
    site: Site = "block"

    @property
    def label(self) -> str:
        """What tables and figures call it: the number of blocks run, "final", or the site and the layer."""
        return {"block": str(self.layer), "final": "final"}.get(self.site, f"{self.site} {self.layer}")

    def __str__(self) -> str:
        return f"layer {self.layer}, site {self.site}"
