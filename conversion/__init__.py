"""Checkpoints of other programs to our folders, and back."""

from conversion.convert import convert
from conversion.export import EXPORT_FORMATS, export

__all__ = ["EXPORT_FORMATS", "convert", "export"]
