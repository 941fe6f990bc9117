"""What a layer's input may pass through before it is quantized, undone by a change of the weight."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange

from qvdjax.errors import UserError
from qvdjax.nn.timestep import TimestepReader, by_row, nearest_timestep
from qvdjax.nn.variables import Scale, shape_of
from qvdjax.numerics import hadamard

if TYPE_CHECKING:
    from qvdjax.nn.scheme import LayerScheme

ORDER = ("shift", "smooth_scale", "rotation", "kronecker")
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


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """A learned invertible matrix on the channels: the Kronecker product of two small ones (FlatQuant, arXiv
    2410.09426), so that it costs in (a + b) multiply-adds a token instead of in**2.

    Attributes:
        left: Size a of the first matrix; None for the divisor of a layer's width that is nearest below its square root.
    """

    left: int | None = None

    def __post_init__(self):
        if self.left is not None and self.left < 1:
            raise ValueError(f"the first Kronecker factor cannot have size {self.left}")

    def sizes_of(self, width: int) -> tuple[int, int]:
        """Sizes (a, b) of the two matrices, a b = width.

        Raises:
            UserError: `left` does not divide the width.
        """
        if self.left is None:
            left = next(a for a in range(math.isqrt(width), 0, -1) if width % a == 0)
        elif width % self.left:
            raise UserError(
                f"a Kronecker factor of size {self.left} does not divide a width of {width}",
                remedy="choose a divisor, or leave the size out",
            )
        else:
            left = self.left
        return left, width // left


def check_transforms(names: tuple[str, ...], rotation: Rotation | None, kronecker: Kronecker | None) -> None:
    """ValueError for names that no transform has, out of order or not fitting what says how."""
    if names != tuple(name for name in ORDER if name in names):
        raise ValueError(f"transforms {names} are not some of {ORDER} in this order")
    for name, how in (("rotation", rotation), ("kronecker", kronecker)):
        if (name in names) != (how is not None):
            raise ValueError(f"the transform {name!r} and how it is made belong together")


class InputTransform(TimestepReader):
    """Subtracts a shift from each input channel (QVD's SCRI), divides it by a scale (SmoothQuant), rotates (QuaRot),
    multiplies by a Kronecker product (FlatQuant); each of them may be absent.

    The weight is changed by the inverses, so that the product stays the same; what a shift takes off the product is
    added again (`qvdjax.ptq.layers`).

    Attributes:
        shift: [in] float32, [timesteps, in] where each timestep has its own, or None.
        smooth_scale: [in] float32, or None.
        signs: [in] float32 of +1 and -1, or None.
        left, right: [a, a] and [b, b] float32 with a b = in, or None. A row x is multiplied by left (x) right from the
            right: with x as a matrix X [a, b], that is left^T X right.
        rotation: How the scaled input is rotated, or None.
        timesteps: Those that have shifts of their own, or None. A call at another takes the nearest one's.
    """

    def __init__(
        self, *, shift: jax.Array | None = None, smooth_scale: jax.Array | None = None, signs: jax.Array | None = None,
        left: jax.Array | None = None, right: jax.Array | None = None, rotation: Rotation | None = None,
        timesteps: tuple[float, ...] | None = None,
    ):  # fmt: skip
        vector, matrix = {"axes": (None,)}, {"axes": (None, None)}
        self.timesteps = timesteps
        self.shift = None if shift is None else Scale(shift, **(vector if timesteps is None else matrix))
        self.smooth_scale = None if smooth_scale is None else Scale(smooth_scale, **vector)
        self.signs = None if signs is None else Scale(signs, **vector)
        self.left, self.right = (None if a is None else Scale(a, **matrix) for a in (left, right))
        self.rotation = rotation

    @classmethod
    def of(cls, scheme: "LayerScheme", arrays: Mapping[str, jax.Array]) -> "InputTransform":
        """What a scheme says, of these arrays."""
        return cls(**arrays, rotation=scheme.rotation, timesteps=scheme.shift_timesteps)

    @classmethod
    def blank(cls, scheme: "LayerScheme", width: int) -> "InputTransform":
        """One that changes nothing but by its rotation, for building the shape of a saved layer."""
        names, rotation = scheme.transforms, scheme.rotation
        signs = rotation is not None and rotation.signs
        left, right = (None, None) if scheme.kronecker is None else map(jnp.eye, scheme.kronecker.sizes_of(width))
        steps = () if scheme.shift_timesteps is None else (len(scheme.shift_timesteps),)
        return cls(
            shift=jnp.zeros((*steps, width), jnp.float32) if "shift" in names else None,
            smooth_scale=jnp.ones((width,), jnp.float32) if "smooth_scale" in names else None,
            signs=jnp.ones((width,), jnp.float32) if signs else None, left=left, right=right, rotation=rotation,
            timesteps=scheme.shift_timesteps,
        )  # fmt: skip

    @property
    def reads_timestep(self) -> bool:
        """Whether shifts are of timesteps."""
        return self.timesteps is not None

    def arrays(self) -> dict[str, jax.Array]:
        """What the constructor takes beside the rotation."""
        held = {name: getattr(self, name) for name in ("shift", "smooth_scale", "signs", "left", "right")}
        return {name: variable[...] for name, variable in held.items() if variable is not None}

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., in], at least float32, as the quantizer wants it; [(batch ...), ..., in] where shifts
        are of timesteps."""
        if self.timesteps is not None:
            return self.behind_shift(x - self.rows_at_timestep(self.shift[...], x.ndim, len(x)))
        return self.behind_shift(x if self.shift is None else x - self.shift[...])

    def of_ranges(self, edge: jax.Array) -> jax.Array:
        """The smallest or the largest input of each channel, of each timestep where shifts are of these, transformed:
        [in] or [timesteps, in], as the shift."""
        return self.behind_shift(edge if self.shift is None else edge - self.shift[...])

    def rows_at_timestep(self, table: jax.Array, axes: int, rows: int) -> jax.Array:
        """A table's row for each sample's timestep, for an array of so many axes and rows.

        table [timesteps, ..., channels] -> [(batch ...), ones, ..., channels], ones so that there are `axes`.
        """
        own = table[nearest_timestep(self.current_timestep(), self.timesteps)]  # [batch, ..., channels]
        own = by_row(own, rows)
        return own.reshape(len(own), *(1,) * (axes - own.ndim), *own.shape[1:])

    def behind_shift(self, x: jax.Array) -> jax.Array:
        """x [..., in] without its shift -> [..., in]."""
        x = self._rotate(x if self.smooth_scale is None else x / self.smooth_scale[...])
        return x if self.left is None else kronecker_product(x, self.left[...], self.right[...])

    def on_weight(self, weight: jax.Array) -> jax.Array:
        """[..., out, in] -> the weight that meets transformed inputs; arrays may carry the same leading axes."""
        if self.smooth_scale is not None:
            weight = weight * self.smooth_scale[...][..., None, :]
        weight = self._rotate(weight, between=1)
        if self.left is None:
            return weight
        inverses = (jnp.linalg.inv(a[...]) for a in (self.left, self.right))
        left, right = (rearrange(a, "... i j -> ... 1 j i") for a in inverses)  # one pair for all rows of a weight
        return kronecker_product(weight, left, right)

    def _rotate(self, x, between: int = 0):
        """x [..., (between,) in]; `between` axes of x are not among those of the signs."""
        if self.rotation is None:
            return x
        if self.signs is not None:
            signs = self.signs[...].astype(x.dtype)
            x = x * signs.reshape(*signs.shape[:-1], *(1,) * between, signs.shape[-1])  # [..., in] -> [..., 1, in]
        return hadamard.rotate(x, self.rotation.block_of(x.shape[-1]))

    def multiply_adds(self, width: int) -> int:
        """Of one vector of this width; a subtraction or a division is counted as one, a sign as none."""
        rotation = 0 if self.rotation is None else hadamard.multiply_adds(width, self.rotation.block_of(width))
        kronecker = 0 if self.left is None else width * (shape_of(self.left)[-1] + shape_of(self.right)[-1])
        one_each = sum(width for vector in (self.shift, self.smooth_scale) if vector is not None)
        return rotation + kronecker + one_each


def kronecker_product(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """x (left (x) right): x [..., in] as matrices X [..., a, b] -> left^T X right, at least float32.

    left [..., a, a] and right [..., b, b] may have leading axes that those of x are broadcast with.
    """
    exact = jax.lax.Precision.HIGHEST  # accelerators would round to bfloat16, and heavy channels would not cancel
    x = rearrange(x, "... (a b) -> ... a b", a=left.shape[-1])
    x = jnp.einsum("...ab,...bc->...ac", x.astype(jnp.promote_types(x.dtype, left.dtype)), right, precision=exact)
    x = jnp.einsum("...ac,...ad->...dc", x, left, precision=exact)
    return rearrange(x, "... a b -> ... (a b)")
