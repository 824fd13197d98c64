"""Prompts behind noise: the most probable one under a stated noise model, with a posterior."""
