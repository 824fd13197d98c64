"""Where the pieces of a large job are done: here, one after the other, or by the processes of a Ray cluster."""

from __future__ import annotations

from sipit.workers.here import Here, Work, Workers
from sipit.workers.on_ray import OnRay

__all__ = ["Here", "OnRay", "Work", "Workers"]
