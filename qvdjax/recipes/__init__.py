"""Methods as compositions: ordered rules over roles and paths, one file a method."""

from qvdjax.recipes.method import PRESET_BITS
from qvdjax.recipes.registry import METHODS, get, method_of, names
from qvdjax.recipes.rules import Decision, Recipe, Rule, decide
from qvdjax.recipes.training import Auxiliary, Training

__all__ = [
    "METHODS", "PRESET_BITS", "Auxiliary", "Decision", "Recipe", "Rule", "Training", "decide", "get", "method_of",
    "names",
]  # fmt: skip
