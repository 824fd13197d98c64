"""Text to fit and to measure on, from what every machine has. Knows nothing of models."""

from sipit.corpora.standard_library import library_code, library_prose

__all__ = ["library_code", "library_prose"]
