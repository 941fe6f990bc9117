"""Video diffusion architectures, one file a family, and how folders of them are read and written."""

from models.families import FAMILIES, abstract, build, family_of, parse_config
from models.folders import load, save, skeleton
from models.vae_folders import VAES, load_vae, save_vae
from models.vae_protocol import Posterior, VideoVAE
from models.vae_tiling import Sections, Tiling

__all__ = [
    "FAMILIES", "VAES", "Posterior", "Sections", "Tiling", "VideoVAE", "abstract", "build", "family_of", "load",
    "load_vae", "parse_config", "save", "save_vae", "skeleton",
]  # fmt: skip
