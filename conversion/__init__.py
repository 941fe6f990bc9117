"""Checkpoints of other programs to our folders, and back."""

from conversion.convert import convert

__all__ = ["convert"]
