"""How to sample below a limit of memory: programs are compiled from shapes and types, before a weight is read.

Text encoder, model and VAE run one after the other, and each is freed before the next is read. What can be chosen:
where texts are encoded (the device, or the host beside an accelerator), how many videos are computed at once, and
whether the VAE decodes whole frames or tiles of them. Wan's VAE goes through a video a latent frame at a time always.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import models
from experiments.sampling.decoding import peak_bytes
from experiments.sampling.published import Pictures
from models.prompts import AT_ONCE, PromptEncoder
from models.vae_folders import vae_shapes
from qvdjax.diffusion import compile_sampler
from qvdjax.errors import UserError

HOST, DEVICE = "host", "device"


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What keeps below a limit.

    Attributes:
        limit: Bytes of a device.
        texts: Where they are encoded, "device" or "host"; None where no text encoder is needed.
        texts_at_once: How many of them.
        batch: Videos computed at once.
        tiling: How the VAE decodes; None for whole frames.
        peaks: Of each component in bytes, by the compiler's account.
    """

    limit: int
    texts: str | None
    texts_at_once: int
    batch: int
    tiling: models.Tiling | None
    peaks: dict[str, int]

    def report(self) -> dict[str, Any]:
        """JSON types."""
        tiling = None if self.tiling is None else dataclasses.asdict(self.tiling)
        return {
            "limit_bytes": self.limit, "texts": self.texts, "texts_at_once": self.texts_at_once, "batch": self.batch,
            "tiling": tiling, "peak_bytes": self.peaks,
        }  # fmt: skip


def parse_limit(text: str) -> int:
    """ "12GiB", "12.5 GB", "800M" -> bytes. Raises `UserError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or (not found[2] and found[3]):
        raise UserError(f"--memory-limit {text!r} is no size", remedy="write it like 12GiB or 800MB")
    power = 0 if not found[2] else " KMGT".index(found[2].upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def plan_memory(
    limit: int,
    *,
    model: Any,
    inputs: Callable[[int], dict],
    sampling: dict[str, Any],
    step_loop: bool,
    batch: int,
    latents: tuple[int, ...],
    encoder: PromptEncoder | None,
    texts: int,
    vae: Path | None,
    pictures: Pictures | None,
    dtype: Any,
) -> MemoryPlan:
    """Choose, component by component, the first of the ways that stays below the limit.

    Args:
        limit: Bytes of one device.
        model: Shapes and types of the denoiser, as it will be loaded.
        inputs: Number of videos -> arguments of `compile_sampler` beside the model.
        sampling, step_loop: The rest of them.
        batch: Most videos at once.
        latents: (frames, height, width, channels) of one video.
        encoder: What encodes `texts` texts; None where they are encoded already.
        vae: Folder of what decodes; None where nothing does.
        pictures: What encodes a picture; None where none is followed.
        dtype: Floating type asked for.

    Raises:
        UserError: Nothing stays below the limit: what each component needs at least; a backend that does not say.
    """
    peaks, least, where, tiling, at_once = {}, {}, None, None, min(AT_ONCE, texts)
    if encoder is not None:
        shapes = encoder.abstract(dtype)
        at_once, needed = _fewer(at_once, limit, lambda count: encoder.peak_bytes(shapes, count))
        where = DEVICE if needed <= limit or jax.default_backend() == "cpu" else HOST
        peaks["text_encoder"] = least["text_encoder"] = needed if where == DEVICE else 0
    size, needed = _fewer(batch, limit, lambda count: _sampler_bytes(model, inputs(count), sampling, step_loop))
    peaks["denoiser"] = least["denoiser"] = needed
    folder = vae if pictures is None else pictures.vae
    if folder is not None:
        tiling, around = _around_latents(
            folder, latents, limit, decodes=vae is not None, pictures=pictures, dtype=dtype
        )
        peaks |= around
        least |= around
    if too_much := {name: bytes_ for name, bytes_ in least.items() if bytes_ > limit}:
        raise UserError(
            f"nothing keeps this below {_said(limit)}; {_said(max(least.values()))} would do",
            remedy="encode prompts elsewhere (encode-prompts), quantize the model, sample a smaller video or spread it"
            " over devices with --mesh",
            items=[f"{name} needs {_said(bytes_)}{_HOW[name]}" for name, bytes_ in too_much.items()],
        )
    return MemoryPlan(limit, where, at_once, size, tiling, peaks)


def _fewer(most: int, limit: int, bytes_of: Callable[[int], int | None]) -> tuple[int, float]:
    """The most at once, at least one, that stay below the limit, and what they need."""
    while True:
        needed = _needed(lambda most=most: bytes_of(most))
        if needed <= limit or most == 1:
            return most, needed
        most = (most + 1) // 2


_HOW = {
    "text_encoder": " for one text at a time",
    "denoiser": " for one video at a time",
    "image_encoder": "",
    "vae": " in its smallest tiles",
    "vae_encoder": " in its smallest tiles",
}


def _around_latents(
    folder: Path, latents: tuple[int, ...], limit: int, *, decodes: bool, pictures: Pictures | None, dtype: Any
) -> tuple[models.Tiling | None, dict[str, float]]:
    """How the VAE decodes and encodes, the first way below the limit or the one that needs least, and what that needs.

    A way is one for both, because a picture's latents should have the seams that the video's will have.
    """
    vae = vae_shapes(folder)
    ways = [None]
    if usual := getattr(vae.config, "default_tiling", None):
        ways += [tiling for tiling in (usual, _halved(usual), _halved(_halved(usual))) if _cuts(tiling, latents)]
    found = []
    for tiling in ways:
        needed = {} if pictures is None else _encoding(pictures, latents[:3], tiling, dtype)
        if decodes:
            needed["vae"] = _needed(lambda tiling=tiling: peak_bytes(vae, latents, tiling))
        found.append(needed)
        if max(needed.values()) <= limit:
            return tiling, needed
    best = min(range(len(ways)), key=lambda way: max(found[way].values()))
    return ways[best], found[best]


def _encoding(pictures: Pictures, size: tuple[int, ...], tiling, dtype: Any) -> dict[str, float]:
    try:
        needed = pictures.peak_bytes(size, tiling, dtype)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"vae_encoder": float("inf")}
    return {name: _needed(lambda bytes_=bytes_: bytes_) for name, bytes_ in needed.items()}


def _halved(tiling: models.Tiling) -> models.Tiling:
    return models.Tiling(*(tuple(max(1, size // 2) for size in sizes) for sizes in (tiling.tile, tiling.stride)))


def _cuts(tiling: models.Tiling, latents: tuple[int, ...]) -> bool:
    """Whether a video is larger than a tile."""
    return latents[1] > tiling.tile[0] or latents[2] > tiling.tile[1]


def _sampler_bytes(model, inputs: dict, sampling: dict, step_loop: bool) -> int | None:
    return compile_sampler(model, **inputs, **sampling, step_loop=step_loop).bytes_held


def _needed(compiled: Callable[[], int | None]) -> float:
    """Bytes; infinitely many where the compiler gives up for want of memory."""
    try:
        needed = compiled()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return float("inf")
    if needed is None:
        raise UserError("this device's compiler does not say what programs need", remedy="leave out --memory-limit")
    return needed


def _said(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
