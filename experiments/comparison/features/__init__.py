"""Grids of temporal features against each other, on a model's own."""
