"""Phi: the start from the residual, the folded weight, and the truncated decomposition behind it."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvdjax.errors import UserError
from qvdjax.numerics import Quantizer, fake_quantize_dynamic
from qvdjax.parallel import Program, make_mesh, shardings
from qvdjax.parallel.program import COLLECTIVES
from qvdjax.qat.phi import Factor, LowRank, low_rank
from qvdjax.qat.truncated_svd import DENSE_UP_TO, truncated_svd

AXES = ("mlp", "embed")


def residual_of(*shape, bits=3, seed=0, spread=0.0):
    """What rounding leaves of a Gaussian weight whose rows and columns differ in scale by exp(spread)."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal(shape)
    weight *= np.exp(spread * random.standard_normal((*shape[:-1], 1)))
    weight *= np.exp(spread * random.standard_normal((*shape[:-2], 1, shape[-1])))
    weight = jnp.asarray(weight, jnp.float32)
    return weight - fake_quantize_dynamic(weight, Quantizer(bits, True))


def energy(values):
    return float(jnp.sum(jnp.square(values)))


# The start


@pytest.mark.parametrize("shape", [(7, 11), (3, 7, 11)])
def test_the_start_is_the_truncated_decomposition_of_the_residual(shape):
    residual = np.asarray(residual_of(*shape))
    phi = low_rank(jnp.asarray(residual), 4, axes=AXES)
    u, s, v = np.linalg.svd(residual, full_matrices=False)
    best = (u[..., :4] * s[..., None, :4]) @ v[..., :4, :]
    # float32 sums of 11 products of numbers below 1
    np.testing.assert_allclose(phi.weight(jnp.ones(4)), best, atol=5e-6)
    left, right = np.asarray(phi.left[...]), np.asarray(phi.right[...])
    # L = U sqrt(S) and R = sqrt(S) V^T: both Gram matrices are the singular values, in order.
    values = s[..., :4, None] * np.eye(4)
    np.testing.assert_allclose(np.swapaxes(left, -1, -2) @ left, values, atol=5e-6)
    np.testing.assert_allclose(right @ np.swapaxes(right, -1, -2), values, atol=5e-6)


def test_full_rank_gives_the_weight_back():
    # W_Phi = W - Q(W): the layer begins as its unrounded weight.
    residual = residual_of(6, 9)
    np.testing.assert_allclose(low_rank(residual, 6, axes=AXES).weight(jnp.ones(6)), residual, atol=5e-6)
    wide = low_rank(residual, 8, axes=AXES)  # two columns more than there are directions
    np.testing.assert_allclose(wide.weight(jnp.ones(8)), residual, atol=5e-6)
    assert not wide.left[...][:, 6:].any()


def test_gates_close_columns_and_scale_their_gradients():
    phi = low_rank(residual_of(3, 7, 11), 4, axes=AXES)
    gamma = jnp.asarray([1.0, 1, 0.25, 0])
    left, right = np.asarray(phi.left[...]), np.asarray(phi.right[...])
    expected = sum(g * left[..., :, i, None] * right[..., i, None, :] for i, g in enumerate(gamma))
    np.testing.assert_allclose(phi.weight(gamma), expected, atol=1e-6)  # float32, numbers below 1
    target = jax.random.normal(jax.random.key(0), expected.shape)
    gradient = jax.grad(lambda phi, gamma: jnp.vdot(phi.weight(gamma), target))
    gated, full = gradient(phi, gamma), gradient(phi, jnp.ones(4))
    np.testing.assert_allclose(gated.left[...], full.left[...] * gamma, atol=1e-6)
    np.testing.assert_allclose(gated.right[...], full.right[...] * gamma[:, None], atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (3, 40, 60)])
def test_random_factors_are_of_the_residuals_strength(shape):
    residual = residual_of(*shape)
    phi = low_rank(residual, 16, axes=AXES, start="random", key=jax.random.key(3))
    mean = np.mean(np.sum(np.square(phi.weight(jnp.ones(16))), (-1, -2)))
    # Of 16 directions each has the energy of two chi-squares of 40 and 60 degrees, deviating by
    # sqrt(2 / 40 + 2 / 60) = 0.29, so their mean by 7 %; their products with each other add 3 %. Four of that.
    expected = np.mean(np.sum(np.square(residual), (-1, -2))) * 16 / 40
    assert mean == pytest.approx(expected, rel=0.35)
    left, right = np.square(phi.left[...]).sum(), np.square(phi.right[...]).sum()
    assert left == pytest.approx(right, rel=0.2)  # 640 and 960 squares: deviations of 6 and 5 %
    if len(shape) == 3:
        assert not np.allclose(phi.left[...][0] / phi.left[...][1], phi.left[...][0, 0, 0] / phi.left[...][1, 0, 0])


def test_a_start_from_zeros_is_zero_and_has_a_gradient():
    residual = residual_of(7, 11)
    phi = low_rank(residual, 4, axes=AXES, start="zeros")
    assert not phi.weight(jnp.ones(4)).any()
    gradient = jax.grad(lambda phi: jnp.vdot(phi.weight(jnp.ones(4)), residual))(phi)
    assert (jnp.abs(gradient.left[...]).max(0) > 0).all()


def test_no_residual_gives_no_nan():
    for start in ("svd", "zeros", "random"):
        phi = low_rank(jnp.zeros((5, 6)), 3, axes=AXES, start=start)
        assert not phi.weight(jnp.ones(3)).any()


def test_wrong_starts_are_refused():
    with pytest.raises(UserError, match="rank 0"):
        low_rank(jnp.zeros((5, 6)), 0, axes=AXES)
    with pytest.raises(UserError, match="'lora'"):
        low_rank(jnp.zeros((5, 6)), 2, axes=AXES, start="lora")


def test_factors_are_parameters_of_their_own_kind():
    phi = jax.eval_shape(lambda: low_rank(jnp.zeros((2, 16, 24), jnp.bfloat16), 4, axes=AXES))
    assert phi.left.get_value().dtype == jnp.float32
    _, factors, rest = nnx.split(phi, Factor, ...)
    assert len(jax.tree.leaves(factors)) == 2
    assert not jax.tree.leaves(rest)
    assert issubclass(Factor, nnx.Param)


def test_rows_and_columns_lie_where_the_weights_do():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    placed = shardings(jax.eval_shape(lambda: low_rank(jnp.zeros((2, 16, 24)), 8, axes=AXES)), mesh)
    assert placed.left.get_value().spec == P(None, "tensor", None)
    assert placed.right.get_value().spec == P(None, None, "fsdp")


# The decomposition


def decaying(rows, columns, base, seed=0):
    """A matrix with singular values base^-i."""
    random = np.random.default_rng(seed)
    u, v = (np.linalg.qr(random.standard_normal((size, min(rows, columns))))[0] for size in (rows, columns))
    return jnp.asarray((u * base ** -np.arange(min(rows, columns))) @ v.T, jnp.float32)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_randomized_equals_dense_where_values_fall(shape):
    matrix = decaying(*shape, 1.3)
    u, s, v = truncated_svd(matrix, 5, method="randomized")
    dense_u, dense_s, dense_v = truncated_svd(matrix, 5, method="dense")
    # Directions beyond the 5 + 16 columns are 1.3^-21 strong and damped by 9 products: below float32 rounding, which
    # the distance of neighbouring values (a quarter) multiplies by a few.
    np.testing.assert_allclose(s, dense_s, rtol=1e-5)
    np.testing.assert_allclose((u * s) @ v, (dense_u * dense_s) @ dense_v, atol=1e-5)
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(v @ v.T, np.eye(5), atol=1e-5)


@pytest.mark.parametrize(("spread", "least"), [(0.0, 0.93), (0.5, 0.98)])
def test_what_the_randomized_decomposition_finds_of_rounding_errors(spread, least):
    # The docstring's 95 and 99 % were seen at 768 x 1536 and rank 32; smaller matrices are not harder.
    residual = residual_of(96, 192, bits=4, spread=spread)
    dense = truncated_svd(residual, 8, method="dense")[1]
    found = truncated_svd(residual, 8, method="randomized")[1]
    assert least < energy(found) / energy(dense) <= 1 + 1e-5  # never more than the best, but for rounding
    fewer = truncated_svd(residual, 8, method="randomized", power_iterations=0, oversample=0)[1]
    assert energy(fewer) < energy(found)


def test_the_seed_decides():
    residual = residual_of(40, 50)
    one, same = (truncated_svd(residual, 4, method="randomized", key=jax.random.key(1)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    other = truncated_svd(residual, 4, method="randomized", key=jax.random.key(2))
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("method", ["dense", "randomized"])
def test_nasty_matrices(method):
    for matrix in (jnp.zeros((9, 7)), jnp.ones((9, 7)), jnp.eye(9, 7)):
        u, s, v = truncated_svd(matrix, 8, method=method)
        assert (u.shape, s.shape, v.shape) == ((9, 8), (8,), (8, 7))
        np.testing.assert_allclose((u * s) @ v, matrix, atol=1e-5)  # at most 7 directions: nothing is cut
        assert s[7] == 0


def test_the_size_decides_unless_told():
    def methods(*shape):
        text = str(jax.make_jaxpr(lambda matrix: truncated_svd(matrix, 2)[1])(jax.ShapeDtypeStruct(shape, jnp.float32)))
        return "random_bits" in text

    assert not methods(DENSE_UP_TO, 3000)
    assert methods(DENSE_UP_TO + 1, 3000)


def largest_moved(compiled):
    """Numbers in the largest array that any collective of the program makes."""
    rows = [row for rows in Program(compiled.as_text()).computations.values() for row in rows]
    shapes = [re.findall(r"\[([\d,]*)\]", row.result) for row in rows if row.kind.removesuffix("-start") in COLLECTIVES]
    assert shapes  # something is spread, so something has to travel
    return max(math.prod(int(size) for size in shape.split(",") if size) for found in shapes for shape in found)


def test_a_spread_matrix_is_decomposed_where_it_lies():
    rows, columns = 128, 192
    mesh = make_mesh({"fsdp": 8})
    place = NamedSharding(mesh, P("fsdp", None))
    find = lambda matrix: truncated_svd(matrix, 4, method="randomized", oversample=4)  # noqa: E731
    matrix = residual_of(rows, columns)
    compiled = jax.jit(find).lower(jax.ShapeDtypeStruct((rows, columns), jnp.float32, sharding=place)).compile()
    # Thin factors of 8 columns travel, at most 192 x 8 numbers at once; the matrix is 16 times that.
    assert largest_moved(compiled) <= columns * 8
    here, there = find(matrix), jax.jit(find)(jax.device_put(matrix, place))
    # The same projection in another order of summation; the values are what does not depend on signs.
    np.testing.assert_allclose(there[1], here[1], rtol=1e-4)


def test_a_phi_made_by_hand():
    phi = LowRank(jnp.ones((3, 2)), jnp.ones((2, 5)), axes=AXES)
    np.testing.assert_array_equal(phi.weight(jnp.asarray([1.0, 0.5])), np.full((3, 5), 1.5))
