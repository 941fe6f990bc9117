"""A transform of a layer's input whose parts are trained."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import InputTransform, Param, Rotation
from qvdjax.nn.transforms import kronecker_product

_EXACT = jax.lax.Precision.HIGHEST


class Learned(Param):
    """What reconstruction trains. Zero is the start, or the identity."""


@jax.custom_vjp
def cayley(skew: jax.Array) -> jax.Array:
    """(1 + A)^-1 (1 - A) for skew A [..., n, n].

    1 + A times its transpose is 1 - A^2, which is positive definite: nothing need be pivoted, and a pivot's
    permutations would take most of the time of a small matrix. Nor is anything solved again in the backward pass.
    """
    return _cayley(skew)[0]


def _cayley(skew):
    """The matrix, and the inverse of 1 + A, which is half of its sum with 1."""
    one = jnp.eye(skew.shape[-1], dtype=skew.dtype)
    lower = jnp.linalg.cholesky(one - jnp.matmul(skew, skew, precision=_EXACT))
    half = jax.scipy.linalg.solve_triangular(lower, one - skew.mT, lower=True)
    inverse = jax.scipy.linalg.solve_triangular(lower, half, lower=True, trans="T").mT
    return 2 * inverse - one, inverse


def _cayley_backward(inverse, gradient):
    """-2 M^T g M^T for the inverse M: that of a matrix's inverse, twice."""
    return (-2 * jnp.matmul(jnp.matmul(inverse.mT, gradient, precision=_EXACT), inverse.mT, precision=_EXACT),)


cayley.defvjp(_cayley, _cayley_backward)


class LearnedMatrix(nnx.Module):
    """start C(A) diag(e^s) C(B)^T with C(A) = (1 + A)^-1 (1 - A) orthogonal for a skew A (Cayley).

    Its inverse is made of the same parts, so that none is computed by elimination and product and inverse agree.

    Attributes:
        start: [n, n] orthogonal, not trained.
        skew: [2, n, n]; A and B are what of them is skew.
        log_singular_values: [n], s. FlatQuant trains e^s itself; a logarithm cannot cross zero.
    """

    def __init__(self, start: jax.Array):
        self.start = nnx.Variable(start)
        self.skew = Learned(jnp.zeros((2, *start.shape), start.dtype), axes=(None, None, None))
        self.log_singular_values = Learned(jnp.zeros(len(start), start.dtype), axes=(None,))

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """The matrix and the inverse of its transpose, [n, n] each."""
        x = self.skew[...]
        left, right = cayley((x - x.mT) / 2)
        left, values = jnp.matmul(self.start[...], left, precision=_EXACT), jnp.exp(self.log_singular_values[...])
        return tuple(jnp.matmul(left * scale, right.T, precision=_EXACT) for scale in (values, 1 / values))


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
            arrays |= {"left": self.left()[0], "right": self.right()[0]}
        return InputTransform(**arrays, rotation=self.rotation)

    def __call__(self, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., in] and weight [out, in] -> both transformed, their product the same."""
        around = InputTransform(**self._around(), rotation=self.rotation)
        x, weight = around(x), around.on_weight(weight)
        if self.left is None:
            return x, weight
        (left, left_inverse), (right, right_inverse) = self.left(), self.right()
        return kronecker_product(x, left, right), kronecker_product(weight, left_inverse, right_inverse)

    def _around(self) -> dict[str, jax.Array]:
        """Scale and signs."""
        arrays = {name: a for name, a in self.fixed.arrays().items() if name in ("smooth_scale", "signs")}
        if self.log_scale is not None:
            arrays["smooth_scale"] = arrays["smooth_scale"] * jnp.exp(self.log_scale[...])
        return arrays
