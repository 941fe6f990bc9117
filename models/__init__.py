"""Video diffusion architectures, one file a family, and how folders of them are read and written."""

from models.families import FAMILIES, abstract, build, family_of, parse_config

__all__ = ["FAMILIES", "abstract", "build", "family_of", "parse_config"]
