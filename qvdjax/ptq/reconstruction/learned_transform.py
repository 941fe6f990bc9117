"""A transform of a layer's input whose parts are trained."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import InputTransform, Param, Rotation
from qvdjax.nn.transforms import kronecker_product

_EXACT = jax.lax.Precision.HIGHEST


class Learned(Param):
    """What reconstruction trains. Zero is the start, or the identity."""


class LearnedMatrix(nnx.Module):
    """start C(A) diag(e^s) C(B)^T with C(A) = (1 + A)^-1 (1 - A) orthogonal for a skew A (Cayley).

    Its inverse is made of the same parts, so that none is computed by elimination and product and inverse agree.

    Attributes:
        start: [n, n] orthogonal, not trained.
        left, right: [n, n]; A and B are what of them is skew.
        log_singular_values: [n], s. FlatQuant trains e^s itself; a logarithm cannot cross zero.
    """

    def __init__(self, start: jax.Array):
        self.start = nnx.Variable(start)
        self.left, self.right = (Learned(jnp.zeros_like(start), axes=(None, None)) for _ in range(2))
        self.log_singular_values = Learned(jnp.zeros(len(start), start.dtype), axes=(None,))

    def __call__(self, *, inverse_transposed: bool = False) -> jax.Array:
        """The matrix [n, n], or the inverse of its transpose."""
        left, right = _cayley(self.left[...]), _cayley(self.right[...])
        values = jnp.exp(-self.log_singular_values[...] if inverse_transposed else self.log_singular_values[...])
        left = jnp.matmul(self.start[...], left, precision=_EXACT)
        return jnp.matmul(left * values, right.T, precision=_EXACT)


def _cayley(x: jax.Array) -> jax.Array:
    skew, one = (x - x.T) / 2, jnp.eye(len(x), dtype=x.dtype)
    return jnp.linalg.solve(one + skew, one - skew)


class LearnedTransform(nnx.Module):
    """Trained channel scale and Kronecker factors around a fixed rotation; each may be absent.

    Attributes:
        log_scale: [in], the logarithm of what channels are divided by over its start, or None.
        left, right: The Kronecker factors, or None.
        fixed: What the transform started as, of which scale and signs stay.
    """

    def __init__(self, start: InputTransform):
        arrays = start.arrays()
        scale = arrays.get("smooth_scale")
        self.log_scale = None if scale is None else Learned(jnp.zeros_like(scale), axes=(None,))
        self.left, self.right = (LearnedMatrix(arrays[side]) if side in arrays else None for side in ("left", "right"))
        self.fixed = start

    @property
    def rotation(self) -> Rotation | None:
        """How inputs are rotated in between."""
        return self.fixed.rotation

    def transform(self) -> InputTransform:
        """As it is now."""
        arrays = self._around()
        if self.left is not None:
            arrays |= {"left": self.left(), "right": self.right()}
        return InputTransform(**arrays, rotation=self.rotation)

    def on_weight(self, weight: jax.Array) -> jax.Array:
        """weight [out, in] -> the weight that meets transformed inputs."""
        weight = InputTransform(**self._around(), rotation=self.rotation).on_weight(weight)
        if self.left is None:
            return weight
        return kronecker_product(weight, self.left(inverse_transposed=True), self.right(inverse_transposed=True))

    def _around(self) -> dict[str, jax.Array]:
        """Scale and signs."""
        arrays = {name: a for name, a in self.fixed.arrays().items() if name in ("smooth_scale", "signs")}
        if self.log_scale is not None:
            arrays["smooth_scale"] = arrays["smooth_scale"] * jnp.exp(self.log_scale[...])
        return arrays
