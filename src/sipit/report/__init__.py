"""Figures from records. Reads nothing but records: no model, no search."""
