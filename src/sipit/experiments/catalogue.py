"""All experiments, by name."""

from __future__ import annotations

from sipit.errors import OptionError
from sipit.experiments.distances import FAMILIES, MINIMUM, PRECISION
from sipit.experiments.experiment import Experiment
from sipit.experiments.inversions import BY_LAYER, INVERSION, LONG, SHARE
from sipit.experiments.matched import MATCHED
from sipit.experiments.next_tokens import CONTINUATIONS, HALF_MARGIN, MARGINS, ROUNDED
from sipit.experiments.theory import ACTIVATIONS, INITIALISATION, REPEATED, TRAINING, WITNESSES

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        *(MINIMUM, PRECISION, CONTINUATIONS, FAMILIES, MATCHED, MARGINS),
        *(INVERSION, LONG, SHARE, BY_LAYER, ROUNDED),
        *(INITIALISATION, TRAINING, WITNESSES, HALF_MARGIN, REPEATED, ACTIVATIONS),
    )
}


def experiments_named(name: str) -> list[Experiment]:
    """Return the experiment of a name, or all of them.

    Raises:
        OptionError: there is none of that name.
    """
    if name == "all":
        return list(EXPERIMENTS.values())
    if name not in EXPERIMENTS:
        raise OptionError(f"experiment {name!r} is unknown; choose all or one of {', '.join(EXPERIMENTS)}")
    return [EXPERIMENTS[name]]
