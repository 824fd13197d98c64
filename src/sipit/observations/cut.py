"""Where states leaked: a layer and a site, printed and compared in this one place."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Site = Literal["block", "final", "kv", "logits"]
SITES: tuple[Site, ...] = get_args(Site)


class Cut(NamedTuple):
    """A place in a model where states are observed; equal to the plain pair (layer, site)."""

    layer: int  # blocks run
    site: Site = "block"

    @property
    def is_final(self) -> bool:
        """Whether the states are those after the final norm."""
        return self.site == "final"

    @property
    def label(self) -> str:
        """What tables and figures call it: the number of blocks run, or "final"."""
        return str(self.layer) if self.site == "block" else self.site

    def __str__(self) -> str:
        return f"layer {self.layer}, site {self.site}"
