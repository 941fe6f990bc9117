"""A trained transform of input and weight, and trained ends of the weight's ranges: what FlatQuant learns."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import InputTransform, LayerScheme
from qvdjax.numerics import fake_quantize
from qvdjax.ptq.reconstruction.learned_transform import Learned, LearnedTransform

CLIP_START = 4.0  # FlatQuant's: sigmoid 0.982


class LearnedClip(Learned):
    """Logits of a clip: the sigmoid is by how much an end of a range is narrowed."""

    @classmethod
    def started(cls, shape: tuple[int, ...]) -> "LearnedClip":
        """Clips that leave nearly the whole range."""
        return cls(jnp.full(shape, CLIP_START, jnp.float32), axes=(None,) * len(shape))

    def factors(self) -> jax.Array:
        """By how much ends are narrowed, in 0 to 1."""
        return jax.nn.sigmoid(self[...])


class FlattenedWeight(nnx.Module):
    """The two operands of a product: input and weight under a trained transform, the weight's range under trained
    clips. Its rounding is to the nearest code, straight through in the backward pass.

    Attributes:
        transform: Of both, or None.
        clip: [2, out or 1, 1], of low and high ends of the weight's ranges; None for a weight that stays float.
    """

    def __init__(self, weight: jax.Array, scheme: LayerScheme, start: InputTransform | None):
        """`weight` [out, in], of which only the shape is read, and what the transform starts as."""
        self.transform = None if start is None else LearnedTransform(start)
        self.quantizer = scheme.weight
        rows = 1 if scheme.weight is None or scheme.weight.granularity == "tensor" else len(weight)
        self.clip = None if scheme.weight is None else LearnedClip.started((2, rows, 1))

    def __call__(self, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., in] and weight [out, in] -> both transformed, the weight rounded."""
        if self.transform is not None:
            x, weight = self.transform(x, weight)
        if self.clip is not None:
            # The range takes part in the gradient, as in FlatQuant's code.
            parameters = self.quantizer.scale_of(weight, tuple(self.clip.factors()))
            weight = fake_quantize(weight, self.quantizer.grid, *parameters)
        return x, weight

    def learned(self) -> dict[str, Any]:
        """`transform`, the arrays of it, and `weight_clip`, factors of low and high ends; each where there is one."""
        found: dict[str, Any] = {}
        if self.transform is not None:
            found["transform"] = self.transform.transform().arrays()
        if self.clip is not None:
            found["weight_clip"] = tuple(self.clip.factors())
        return found
