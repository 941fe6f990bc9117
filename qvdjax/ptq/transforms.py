"""How the transforms of a layer's input are fitted to a weight and to what calibration saw."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qvdjax.calibration.steps import timesteps_of
from qvdjax.nn import LayerScheme
from qvdjax.nn.transforms import InputTransform, Kronecker, Rotation


@dataclasses.dataclass(frozen=True)
class FitChannelScale:
    """SmoothQuant's channel scale max|x|**alpha / max|w|**(1 - alpha) (Xiao et al. 2022, equation 4).

    Attributes:
        alpha: In 0..1, how much of the spread moves from the input to the weight.
        floor: Smallest maximum that counts, so that a channel that is always zero keeps a finite scale.
        absorb: Whether scales are put into weights where that is exact (`qvdjax.ptq.absorb`).
    """

    alpha: float
    floor: float = 1e-5
    absorb: bool = False

    names = ("smooth_scale",)
    rotation = kronecker = None
    needs_calibration = True

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0 to 1, not {self.alpha}")

    def fit(self, weight: jax.Array, low: jax.Array, high: jax.Array) -> InputTransform:
        """weight [out, in] and the smallest and largest input of each channel [in] -> the transform."""
        inputs = jnp.maximum(jnp.maximum(-low, high), self.floor)
        weights = jnp.maximum(jnp.abs(weight).max(axis=0), self.floor)  # [in]
        return InputTransform(smooth_scale=(inputs**self.alpha / weights ** (1 - self.alpha)).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class FitEvenChannels:
    """Each channel is divided by how large it is beside the others, (r / median of r)^strength, with r its magnitude.

    Attributes:
        strength: 1 makes all channels equally large, 0 none.
        floor: Smallest share of the median that counts, so that a channel that is always zero keeps a finite scale.
    """

    strength: float = 1.0
    floor: float = 1e-3

    names = ("smooth_scale",)
    rotation = kronecker = None
    needs_calibration = True

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must lie in 0 to 1, not {self.strength}")

    def fit(self, weight: jax.Array, low: jax.Array, high: jax.Array) -> InputTransform:
        """The smallest and largest input of each channel [in] -> the transform; nothing is read of the weight."""
        sizes = jnp.maximum(-low, high)
        middle = jnp.median(sizes)
        share = jnp.maximum(sizes / jnp.where(middle > 0, middle, 1), self.floor)
        return InputTransform(smooth_scale=jnp.where(middle > 0, share**self.strength, 1).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class FitRotation:
    """A Hadamard matrix behind random signs, the same for all layers of one width (QuaRot, Ashkboos et al. 2024).

    Attributes:
        rotation: Blocks, and whether there are signs.
        seed: Of the signs.
        absorb: Whether rotations are put into weights where that is exact (`qvdjax.ptq.absorb`).
    """

    rotation: Rotation = Rotation()
    seed: int = 0
    absorb: bool = False

    names = ("rotation",)
    kronecker = None
    needs_calibration = False

    def signs(self, width: int) -> jax.Array:
        """float32 [width] of +1 and -1."""
        return jax.random.rademacher(jax.random.key(self.seed), (width,), jnp.float32)

    def fit(self, weight: jax.Array, low: jax.Array, high: jax.Array) -> InputTransform:
        """weight [out, in] says the width; nothing is read from its values, nor from the ranges [in]."""
        signs = self.signs(weight.shape[-1]) if self.rotation.signs else None
        return InputTransform(signs=signs, rotation=self.rotation)


@dataclasses.dataclass(frozen=True)
class FitProduct:
    """A channel scale, then a rotation (ViDiT-Q) or a Kronecker product of random orthogonal matrices, which
    reconstruction trains (FlatQuant); all layers of one width start with the same.

    Attributes:
        scale: The channel scale.
        rotate: The rotation, None for none.
        kronecker: The Kronecker product, None for none.
        seed: Of its matrices.
    """

    scale: FitChannelScale
    rotate: FitRotation | None = None
    kronecker: Kronecker | None = None
    seed: int = 0

    needs_calibration = True

    @property
    def rotation(self) -> Rotation | None:
        """How inputs are rotated."""
        return None if self.rotate is None else self.rotate.rotation

    @property
    def names(self) -> tuple[str, ...]:
        """Of the transforms."""
        present = {"smooth_scale": self.scale, "rotation": self.rotate, "kronecker": self.kronecker}
        return tuple(name for name, fit in present.items() if fit is not None)

    def fit(self, weight: jax.Array, low: jax.Array, high: jax.Array) -> InputTransform:
        """weight [out, in] and the smallest and largest input of each channel [in] -> the transform."""
        width = weight.shape[-1]
        arrays = self.scale.fit(weight, low, high).arrays()
        if self.rotate is not None:
            arrays |= self.rotate.fit(weight, low, high).arrays()
        if self.kronecker is not None:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), width))
            sizes = self.kronecker.sizes_of(width)
            arrays |= {
                side: jax.random.orthogonal(key, size, dtype=jnp.float32)
                for side, key, size in zip(("left", "right"), keys, sizes, strict=True)
            }
        return InputTransform(**arrays, rotation=self.rotation)


@dataclasses.dataclass(frozen=True)
class SearchScale:
    """Behind a shift, channels wider than a threshold T are brought to it (OS+, arXiv 2304.09145, section 4.3):

        s = max(1, w / T) with w half the width of a channel's range

    T is that of the least squared error of the layer's output with its weight, and its input in [-T, T], rounded.
    Candidates are even from the largest w to the mean w, as in QVD's release; OS+ goes down to 1. The release takes at
    least 100 of them, and more where inputs are larger than 50; it judges query, key and value together by the output
    of their attention, where each layer is judged by its own here.

    Attributes:
        candidates: Number of thresholds.
    """

    candidates: int = 100

    names = ("smooth_scale",)

    def __post_init__(self):
        if self.candidates < 1:
            raise ValueError(f"a search needs at least one threshold, not {self.candidates}")

    def thresholds(self, width: jax.Array) -> jax.Array:
        """Half widths [in] -> thresholds [candidates], descending."""
        return jnp.maximum(jnp.linspace(width.max(), width.mean(), self.candidates), 1e-30)

    def scale_of(self, width: jax.Array, threshold: jax.Array) -> jax.Array:
        """Half widths of channels' ranges [in] and T [] -> what the channels are divided by [in]."""
        return jnp.maximum(1, width / threshold)


@dataclasses.dataclass(frozen=True)
class FitShift:
    """The middle of each channel's range becomes zero (QVD's SCRI, its release's mode "mid"), then a channel scale.

    Attributes:
        scale: Of what is left, None for none. A `SearchScale` is found with inputs at hand
            (`qvdjax.ptq.scale_search`), not by `fit`.
    """

    scale: FitChannelScale | SearchScale | None = None

    rotation = kronecker = None
    needs_calibration = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of the transforms."""
        return ("shift",) if self.scale is None else ("shift", "smooth_scale")

    @property
    def search(self) -> SearchScale | None:
        """How the scale is searched for, None where nothing is."""
        return self.scale if isinstance(self.scale, SearchScale) else None

    def fit(self, weight: jax.Array, low: jax.Array, high: jax.Array) -> InputTransform:
        """weight [out, in] and the smallest and largest input of each channel [in] -> the transform.

        Ranges of timesteps [timesteps, in] make shifts of timesteps, behind which the scale is of all.
        """
        if self.search is not None:
            raise ValueError("a scale that is searched for does not follow from ranges: see qvdjax.ptq.scale_search")
        shift = ((low + high) / 2).astype(jnp.float32)
        if self.scale is None:
            return InputTransform(shift=shift)
        width = low.shape[-1]
        low, high = (low - shift).reshape(-1, width).min(axis=0), (high - shift).reshape(-1, width).max(axis=0)
        return InputTransform(shift=shift, **self.scale.fit(weight, low, high).arrays())


def with_shifts_of_timesteps(schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, Any]:
    """The schemes, by name in diffusers, with a shift for each timestep of a calibration set where they have one."""
    timesteps = tuple(timesteps_of(batches))
    reason = f"each of {len(timesteps)} timesteps has a shift of its own"
    return {
        name: dataclasses.replace(scheme, shift_timesteps=timesteps, reason=f"{scheme.reason}; {reason}")
        if isinstance(scheme, LayerScheme) and "shift" in scheme.transforms else scheme
        for name, scheme in schemes.items()
    }  # fmt: skip
