"""What a layer's input may pass through before it is quantized, undone by a change of the weight."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn.variables import Scale
from qvdjax.numerics import hadamard

ORDER = ("smooth_scale", "rotation")
"""Names of transforms, in the order in which an input passes through them."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How inputs are rotated: by a Hadamard matrix a block of neighbouring channels (`qvdjax.numerics.hadamard`).

    Attributes:
        block: Most channels of a block; None for as many as there are. A layer's blocks are the largest divisor of its
            width, at most this, of which a Hadamard matrix is built.
        signs: Whether each channel has a random sign, which it is multiplied by first.
    """

    block: int | None = None
    signs: bool = True

    def __post_init__(self):
        if self.block is not None and self.block < 2:
            raise ValueError(f"a rotation takes blocks of at least 2 channels, not {self.block}")

    def block_of(self, width: int) -> int:
        """Channels of a block in a layer of this width; 1, which rotates nothing, where the width is odd."""
        return hadamard.largest_order(width, self.block)


def check_transforms(names: tuple[str, ...], rotation: Rotation | None) -> None:
    """ValueError for names that no transform has, out of order or not fitting the rotation."""
    if names != tuple(name for name in ORDER if name in names):
        raise ValueError(f"transforms {names} are not some of {ORDER} in this order")
    if ("rotation" in names) != (rotation is not None):
        raise ValueError("the transform 'rotation' and how it rotates belong together")


class InputTransform(nnx.Module):
    """Divides each input channel by a scale (SmoothQuant), then rotates (QuaRot); each of the two may be absent.

    The weight's columns are multiplied by the scale and rotated alike, so that the product stays the same.

    Attributes:
        smooth_scale: [in] float32, or None.
        signs: [in] float32 of +1 and -1, or None.
        rotation: How the scaled input is rotated, or None.
    """

    def __init__(
        self, *, smooth_scale: jax.Array | None = None, signs: jax.Array | None = None, rotation: Rotation | None = None
    ):
        self.smooth_scale = None if smooth_scale is None else Scale(smooth_scale, axes=(None,))
        self.signs = None if signs is None else Scale(signs, axes=(None,))
        self.rotation = rotation

    @classmethod
    def blank(cls, names: tuple[str, ...], rotation: Rotation | None, width: int) -> "InputTransform":
        """One whose arrays are ones, for building the shape of a saved layer."""
        signs = rotation is not None and rotation.signs
        return cls(
            smooth_scale=jnp.ones((width,), jnp.float32) if "smooth_scale" in names else None,
            signs=jnp.ones((width,), jnp.float32) if signs else None, rotation=rotation,
        )  # fmt: skip

    def arrays(self) -> dict[str, jax.Array]:
        """What the constructor takes beside the rotation."""
        held = {"smooth_scale": self.smooth_scale, "signs": self.signs}
        return {name: variable[...] for name, variable in held.items() if variable is not None}

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., in], at least float32, as the quantizer wants it."""
        return self._rotate(x if self.smooth_scale is None else x / self.smooth_scale[...])

    def on_weight(self, weight: jax.Array) -> jax.Array:
        """[..., out, in] -> the weight that meets transformed inputs; arrays may carry the same leading axes."""
        if self.smooth_scale is not None:
            weight = weight * self.smooth_scale[...][..., None, :]
        return self._rotate(weight, between=1)

    def _rotate(self, x, between: int = 0):
        """x [..., (between,) in]; `between` axes of x are not among those of the signs."""
        if self.rotation is None:
            return x
        if self.signs is not None:
            signs = self.signs[...].astype(x.dtype)
            x = x * signs.reshape(*signs.shape[:-1], *(1,) * between, signs.shape[-1])  # [..., in] -> [..., 1, in]
        return hadamard.rotate(x, self.rotation.block_of(x.shape[-1]))

    def multiply_adds(self, width: int) -> int:
        """Of one vector of this width; a division is counted as one, a sign as none."""
        rotation = 0 if self.rotation is None else hadamard.multiply_adds(width, self.rotation.block_of(width))
        return rotation + (0 if self.smooth_scale is None else width)
