"""Trained methods against each other on the bench: the same teacher, data, steps and learning rate for all."""
