"""How much of their prompts states give away, with which defence, and what the defence costs."""

from sipit.audit.cells import Cell, Plan, Trial, cells_of, given_away, wilson
from sipit.audit.defences import DEFENCES, Defence, defence_named
from sipit.audit.run import audit, require_undefended

__all__ = [
    "DEFENCES",
    "Cell",
    "Defence",
    "Plan",
    "Trial",
    "audit",
    "cells_of",
    "defence_named",
    "given_away",
    "require_undefended",
    "wilson",
]
