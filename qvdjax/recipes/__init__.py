"""Methods as compositions: ordered rules over roles and paths, one file a method."""

from qvdjax.recipes.registry import METHODS, PRESET_BITS, get, method_of, names
from qvdjax.recipes.rules import Decision, Recipe, Rule, decide

__all__ = ["METHODS", "PRESET_BITS", "Decision", "Recipe", "Rule", "decide", "get", "method_of", "names"]
