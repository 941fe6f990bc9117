"""LSQ and LSQ+: gradients against their closed forms, and where they start."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.numerics import Grid, Quantizer, encode
from qvdjax.qat import learned_weights
from qvdjax.qat.learned_weights import SMALLEST_SCALE, fake_quantize_learned, gradient_factor, positive

OUT, WIDTH = 3, 11


def weights():
    return jnp.asarray(np.random.default_rng(0).standard_normal((OUT, WIDTH)), jnp.float32)


def parameters(symmetric):
    """Steps so small that some weights clip at each end, and zero points between two codes."""
    scale = jnp.array([[0.31], [0.22], [0.17]])
    return scale, None if symmetric else jnp.array([[0.37], [-1.21], [-0.8]])


def closed_forms(weight, grid, scale, zero_point, upstream):
    """Gradients of sum upstream * w^ (LSQ equation 3, LSQ+ equation 5), in float64."""
    w, s, g = (np.asarray(a, np.float64) for a in (weight, scale, upstream))
    z = 0.0 if zero_point is None else np.asarray(zero_point, np.float64)
    u = w / s + z
    inside = (np.round(u) >= grid.low) & (np.round(u) <= grid.high)
    code = np.clip(np.round(u), grid.low, grid.high)
    of_scale = (code - z) - inside * (w / s)
    of_zero_point = s * (inside - 1.0)
    return g * inside, (g * of_scale).sum(1, keepdims=True), (g * of_zero_point).sum(1, keepdims=True)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_the_closed_forms(symmetric, scaled):
    grid, weight, (scale, zero_point) = Grid(3, symmetric), weights(), parameters(symmetric)
    upstream = jnp.asarray(np.random.default_rng(1).standard_normal((OUT, WIDTH)), jnp.float32)

    def total(weight, scale, zero_point):
        return (upstream * fake_quantize_learned(weight, grid, scale, zero_point, scaled_gradients=scaled)).sum()

    of_weight, *of_parameters = jax.grad(total, (0, 1) if symmetric else (0, 1, 2))(weight, scale, zero_point)
    wanted_weight, *wanted = closed_forms(weight, grid, scale, zero_point, upstream)
    assert 0 < (wanted_weight == 0).sum() < wanted_weight.size  # both cases occur
    factor = 1 / np.sqrt(WIDTH * (3 if symmetric else 7)) if scaled else 1.0
    # w / s * s: two float32 roundings.
    chex.assert_trees_all_close(of_weight, wanted_weight.astype(np.float32), rtol=1e-6)
    # Sums of eleven float32 terms near 1, some of them differences.
    wanted = [(factor * one).astype(np.float32) for one in wanted[: len(of_parameters)]]
    chex.assert_trees_all_close(of_parameters, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_where_every_weight_is_clipped_gradients_are_finite_differences(symmetric):
    """There no rounding is on the way: w^ is (code - z) s, smooth in s and z."""
    grid, (scale, zero_point) = Grid(3, symmetric), parameters(symmetric)
    weight = jnp.where(weights() < 0, -9.0, 9.0)
    inputs = (scale,) if symmetric else (scale, zero_point)

    def total(*parameters):
        scale, zero_point = (*parameters, None)[:2]
        return jnp.square(fake_quantize_learned(weight, grid, scale, zero_point, scaled_gradients=False)).sum()

    gradients = jax.grad(total, tuple(range(len(inputs))))(*inputs)
    for number, gradient in enumerate(gradients):
        for row in range(OUT):
            moved = lambda by, n=number, r=row: [a.at[r].add(by if i == n else 0) for i, a in enumerate(inputs)]  # noqa: E731
            # A quadratic's central difference is exact; float32 sums near 30 over a step of 0.02 leave 1e-3.
            difference = (total(*moved(0.01)) - total(*moved(-0.01))) / 0.02
            np.testing.assert_allclose(gradient[row, 0], difference, rtol=1e-3, atol=1e-2)


def test_scaling_gradients_leaves_values_alone():
    grid, (scale, zero_point) = Grid(4, symmetric=False), parameters(False)
    values = [fake_quantize_learned(weights(), grid, scale, zero_point, scaled_gradients=on) for on in (True, False)]
    chex.assert_trees_all_equal(*values)
    chex.assert_trees_all_equal(values[0], encode(weights(), grid, scale, zero_point).dequantize())


def test_the_gradient_factor_counts_weights_and_codes():
    assert gradient_factor(11, Grid(4)) == pytest.approx((11 * 7) ** -0.5)
    assert gradient_factor(11, Grid(4, symmetric=False)) == pytest.approx((11 * 15) ** -0.5)


def test_a_step_size_below_zero_can_come_back():
    scale = jnp.array([-0.5, 0.0, 0.25])
    chex.assert_trees_all_equal(positive(scale), jnp.array([SMALLEST_SCALE, SMALLEST_SCALE, 0.25], jnp.float32))
    chex.assert_trees_all_equal(jax.grad(lambda s: positive(s).sum())(scale), jnp.ones(3))


def test_minmax_start_covers_every_weight():
    scale, zero_point = learned_weights.start(weights(), Quantizer(4), "minmax")
    chex.assert_trees_all_close(scale[:, 0], jnp.abs(weights()).max(axis=1) / 7, rtol=1e-6)  # one division
    assert zero_point is None
    scale, zero_point = learned_weights.start(weights(), Quantizer(4, symmetric=False), "minmax")
    low, high = weights().min(axis=1), weights().max(axis=1)
    chex.assert_trees_all_close(scale[:, 0], (high - low) / 15, rtol=1e-6)
    # The textbook -min / s, minus 8; fractional. Two float32 divisions of numbers near 8.
    chex.assert_trees_all_close(zero_point[:, 0], -low / scale[:, 0] - 8, atol=1e-5)
    assert (zero_point != jnp.round(zero_point)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_start_is_the_best_of_eighty_shrinks(symmetric):
    """Against a plain loop in float64."""
    weight, top = np.asarray(weights(), np.float64) ** 3, 3 if symmetric else 7  # cubes: long tails
    scale, zero_point = learned_weights.start(jnp.asarray(weight, jnp.float32), Quantizer(3, symmetric))
    for row in range(OUT):
        low, high = weight[row].min(), weight[row].max()
        scores = []
        for i in range(80):
            p = 1 - i / 100
            if symmetric:
                s, z, ends = p * max(-low, high) / 3, 0.0, (-4, 3)
            else:
                s, ends = p * (high - low) / 7, (0, 7)
                z = -p * low / s
            real = s * (np.clip(np.round(weight[row] / s + z), *ends) - z)
            scores.append((np.abs(real - weight[row]) ** 2.4).sum())
        whole = max(-low, high) / 3 if symmetric else (high - low) / top
        chosen = round((1 - float(scale[row, 0]) / whole) * 100)
        assert chosen > 0  # the tails make shrinking worth while
        # Float32 may take a neighbour whose score is as good to its rounding.
        assert scores[chosen] <= min(scores) * (1 + 1e-4)
    assert (zero_point is None) == symmetric


def test_lsqs_own_start():
    scale, _ = learned_weights.start(weights(), Quantizer(4), "mean")
    chex.assert_trees_all_close(scale[:, 0], 2 * jnp.abs(weights()).mean(axis=1) / 7**0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="mean"):
        learned_weights.start(weights(), Quantizer(4, symmetric=False), "mean")


def test_odd_channels_start_finite():
    """All zero, and all of one sign: the range includes zero, so no zero point leaves the codes."""
    odd = jnp.stack([jnp.zeros(WIDTH), jnp.full(WIDTH, 5.0), jnp.linspace(-3.0, -2.9, WIDTH)])
    for symmetric in (True, False):
        for method in ("search", "minmax"):
            scale, zero_point = learned_weights.start(odd, Quantizer(4, symmetric), method)
            assert bool(jnp.isfinite(scale).all() & (scale > 0).all())
            assert zero_point is None or bool((jnp.abs(zero_point) <= 8).all())


def test_groups_and_tensors_have_their_own_starts():
    wide = jnp.concatenate([weights()[:, :10], 100 * weights()[:, :10]], axis=1)
    scale, _ = learned_weights.start(wide, Quantizer(4, granularity="group", group_size=10), "search")
    chex.assert_trees_all_close(scale[:, 1], 100 * scale[:, 0], rtol=1e-5)  # the same search, scaled
    scale, _ = learned_weights.start(wide, Quantizer(4, granularity="tensor"), "minmax")
    assert scale.shape == (1, 1)
