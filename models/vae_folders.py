"""The VAEs that are known, and how their folders are read and written, without PyTorch.

They have a table of their own beside `models.FAMILIES`, because what reads that one (quantizing, sampling, training,
planning) works on denoisers; a VAE is none (see `models.vae_protocol`).
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.families import FAMILIES, Family, parse_fields
from models.folders import abstract_model, save
from models.vae_cogvideox import AutoencoderKLCogVideoX, CogVideoXVAEConfig
from models.vae_config import VAEConfig
from models.vae_hunyuanvideo import AutoencoderKLHunyuanVideo, HunyuanVideoVAEConfig
from models.vae_image import AutoencoderKL, ImageVAEConfig
from models.vae_protocol import VideoVAE
from models.vae_temporal import AutoencoderKLTemporalDecoder, TemporalVAEConfig
from models.vae_wan import AutoencoderKLWan, WanVAEConfig
from qvdjax.checkpoint import CheckpointFolder, Progress, load_variables, loaded_shapes
from qvdjax.checkpoint.header import TensorInfo
from qvdjax.errors import UserError

VAES = {
    "AutoencoderKL": Family("image-vae", ImageVAEConfig, AutoencoderKL),
    "AutoencoderKLCogVideoX": Family("cogvideox-vae", CogVideoXVAEConfig, AutoencoderKLCogVideoX),
    "AutoencoderKLHunyuanVideo": Family("hunyuanvideo-vae", HunyuanVideoVAEConfig, AutoencoderKLHunyuanVideo),
    "AutoencoderKLTemporalDecoder": Family(
        "stable-video-diffusion-vae", TemporalVAEConfig, AutoencoderKLTemporalDecoder
    ),
    "AutoencoderKLWan": Family("wan-vae", WanVAEConfig, AutoencoderKLWan),
}


def build_vae(config: Mapping[str, Any], *, key: jax.Array | None = None, dtype=jnp.float32) -> VideoVAE:
    """A freshly initialised VAE; under `jax.eval_shape` it takes no memory.

    Args:
        config: Fields of `config.json`.
        key: For the initial weights, `jax.random.key(0)` by default.
        dtype: Of all parameters.

    Raises:
        UserError: An architecture that is no VAE or not known, an unknown field, or a value that does not fit.
    """
    parsed = parse_vae_config(config)
    model = VAES[config["_class_name"]].model
    return model(parsed, key=jax.random.key(0) if key is None else key, dtype=dtype)


def parse_vae_config(config: Mapping[str, Any]) -> VAEConfig:
    """The fields of a VAE's `config.json`; UserError for what `build_vae` refuses."""
    name = config.get("_class_name")
    if name not in VAES:
        what = "a denoiser, not a VAE" if name in FAMILIES else "not a VAE that is known"
        raise UserError(f"config.json names {name!r}, which is {what}", remedy=f"known: {', '.join(VAES)}")
    return parse_fields(dict(config), VAES[name].config, VAES[name].name)


def load_vae(
    path: str | os.PathLike, *, dtype: Any = None, sharding: jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
) -> VideoVAE:  # fmt: skip
    """Read a VAE's folder as diffusers writes it; of a pipeline's folder that is the one named `vae`.

    Args:
        path: The folder (config.json and safetensors, whole or in shards). Attention may have the names it had in
            diffusers until 2023, as in Stable Diffusion 1.5's own folder.
        dtype: Floating type of the weights, in which it also computes; None keeps the file's. Norms become no narrower
            than float32.
        sharding: Where the weights lie, whole; None: on the first device.
        progress: Called with (stage, bytes done, bytes in all).

    Raises:
        UserError: A missing, truncated or corrupt file; unknown, missing or mis-shaped keys; weights that are not
            finite; an architecture that is no VAE or not known; a quantization that is not ours.
    """
    folder = open_vae_folder(path)
    abstract = abstract_vae(folder)
    dtype = None if dtype is None else jnp.dtype(dtype)
    return load_variables(abstract, folder, dtype=dtype, shardings=sharding, progress=progress)


def save_vae(
    vae: VideoVAE, path: str | os.PathLike, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Write a VAE as a folder that `load_vae`, and one that is not quantized that diffusers too, read back bit for bit.

    Raises:
        UserError: The target exists and `overwrite` is not set, it cannot be written, or the disk is full.
    """
    save(vae, path, overwrite=overwrite, progress=progress)


def abstract_vae(folder: CheckpointFolder) -> VideoVAE:
    """The VAE that a folder's config describes, quantized layers in place, without a look at its tensors."""
    return abstract_model(folder, None, build=build_vae)


def vae_shapes(path: str | os.PathLike) -> VideoVAE:
    """A folder's VAE as shapes and types, as `load_vae` will read it; no weight is read."""
    folder = open_vae_folder(path)
    return loaded_shapes(abstract_vae(folder), folder)


# Parts of an attention's names until diffusers 0.15 -> today's (`ModelMixin._fix_state_dict_keys_on_load`).
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class _RenamedFolder(CheckpointFolder):
    """A folder whose tensors go by other names than in its files.

    Attributes:
        old: The name in the files, by the other one, which is the key in `files`.
    """

    old: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def info(self, key: str) -> TensorInfo:
        return self.files[key].tensors[self.old[key]]

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.files[key].read(self.old[key], index)


def open_vae_folder(path: str | os.PathLike) -> CheckpointFolder:
    """A VAE's folder with attentions named as today; a name that is there already is left to the check of all names.

    Raises:
        UserError: See `CheckpointFolder.open`.
    """
    folder = CheckpointFolder.open(path)

    def new(key: str) -> str:
        before, dot, last = key.rpartition(".")
        block, _, part = before.rpartition(".")
        renamed = f"{block}.{_OLD_NAMES[part]}{dot}{last}" if ".attentions." in key and part in _OLD_NAMES else key
        return key if renamed in folder.files else renamed

    old = {new(key): key for key in folder.files}
    return _RenamedFolder(folder.path, folder.config, {key: folder.files[name] for key, name in old.items()}, old)
