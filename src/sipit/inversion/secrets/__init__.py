"""Prompts of states behind a secret linear map: rotated, or mixed with one another."""

from sipit.inversion.secrets.follow import Followed, follow
from sipit.inversion.secrets.relations import InSpan, Relation, UpToRotation

__all__ = ["Followed", "InSpan", "Relation", "UpToRotation", "follow"]
