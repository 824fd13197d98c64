"""A learned inverse from states to tokens, fitted in minutes, once per model, layer and site."""

from sipit.inversion.fitting.fit import FitProgress, FittedScores, fit_inverse
from sipit.inversion.fitting.states import Cut
from sipit.inversion.fitting.store import Fit, fit_path, load_fit
from sipit.inversion.fitting.training import Recipe

__all__ = ["Cut", "Fit", "FitProgress", "FittedScores", "Recipe", "fit_inverse", "fit_path", "load_fit"]
