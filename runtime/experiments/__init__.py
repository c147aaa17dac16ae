"""Experiments: what runs of several arms come to, seed by seed, and how they compare."""
