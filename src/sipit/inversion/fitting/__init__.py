"""A learned inverse from states to tokens, fitted in minutes, once per model, layer and site."""

from sipit.inversion.fitting.fit import FitProgress, fit_inverse
from sipit.inversion.fitting.training import Recipe

__all__ = ["FitProgress", "Recipe", "fit_inverse"]
