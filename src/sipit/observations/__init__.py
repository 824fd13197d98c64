"""What leaked: the hidden states of one prompt, and the file they travel in."""

from sipit.observations.cut import OF_ONE_LAYER, SITES, Cut, Site
from sipit.observations.file import read_observation, write_observation
from sipit.observations.many import holds_many, read_each, read_observations, write_observations
from sipit.observations.observation import DTYPES, Observation, dtype_named

__all__ = [
    "DTYPES",
    "OF_ONE_LAYER",
    "SITES",
    "Cut",
    "Observation",
    "Site",
    "dtype_named",
    "holds_many",
    "read_each",
    "read_observation",
    "read_observations",
    "write_observation",
    "write_observations",
]
