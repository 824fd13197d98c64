"""Where rows come from: which model, layer and site fit a dump, and whether a dump is what its label says."""

from sipit.inversion.places.identify import Fit, Identification, identify
from sipit.inversion.places.verify import BadRow, Verification, verify

__all__ = ["BadRow", "Fit", "Identification", "Verification", "identify", "verify"]
