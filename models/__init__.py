"""Video diffusion architectures, one file a family, and how folders of them are read and written."""

from models.families import FAMILIES, abstract, build, family_of, parse_config
from models.folders import load, save, skeleton

__all__ = ["FAMILIES", "abstract", "build", "family_of", "load", "parse_config", "save", "skeleton"]
