"""A page of this machine alone: states in, tokens out as they are accepted, with their evidence. Extra `web`."""

from __future__ import annotations

from sipit.web.app import serving

__all__ = ["serving"]
