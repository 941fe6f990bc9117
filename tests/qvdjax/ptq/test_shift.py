"""A shifted input: the product is the same as without the shift, at borders too, and static ranges follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear
from qvdjax.numerics import Grid, Quantizer
from qvdjax.ptq import ErrorCompensation, FitChannelScale, FitShift, RangeSearch, quantize_layer

WEIGHT, STATIC = Quantizer(8), Quantizer(8, symmetric=False, granularity="tensor")


def whole_numbers(layer, seed: int = 0):
    """The layer with weights that 8 bits hold exactly: whole numbers, the largest of each row 127."""
    shape = layer.weight[...].shape
    codes = np.random.default_rng(seed).integers(-126, 127, shape)
    codes.reshape(len(codes), -1)[:, 0] = 127
    layer.weight[...] = jnp.asarray(codes, jnp.float32)
    return layer


def inputs(shape: tuple[int, ...], seed: int = 1) -> jax.Array:
    """Channels that lie far from zero, each elsewhere."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=shape) + 9 * random.normal(size=shape[-1]), jnp.float32)


def channel_range(x: jax.Array) -> tuple:
    axes = tuple(range(x.ndim - 1))
    return x.min(axis=axes), x.max(axis=axes)


CONVOLUTIONS = {
    "3x3": {"kernel": (3, 3), "padding": ((1, 1), (1, 1))},
    "strided": {"kernel": (3, 3), "padding": ((1, 1), (1, 1)), "stride": (2, 2)},
    "one side": {"kernel": (2, 3), "padding": ((0, 1), (2, 0))},
    "1x1": {"kernel": (1, 1)},
    "over frames": {"kernel": (3, 1, 1), "padding": ((1, 1), (0, 0), (0, 0))},
}


@pytest.mark.parametrize("scale", [None, FitChannelScale(0.5)], ids=["shift", "shift and scale"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_unchanged_before_inputs_are_rounded(kind, scale):
    arguments = CONVOLUTIONS[kind]
    layer = Conv(3, 5, **arguments, role="convolution", axes=(None, None), key=jax.random.key(0))
    layer = whole_numbers(layer)
    x = inputs((2, *(5, 4, 6)[-len(arguments["kernel"]) :], 3))
    fit = FitShift(scale)
    weight = WEIGHT if scale is None else Quantizer(8, granularity="channel")
    scheme = LayerScheme(weight, None, fit.names)
    shifted = quantize_layer(layer, scheme, execution="simulate", fit=fit, input_range=channel_range(x))
    exact = np.asarray(layer(x))
    if scale is None:
        # float32 sums of up to 27 products of 127 and 30
        np.testing.assert_allclose(shifted(x), exact, atol=1e-5 * np.abs(exact).max())
    else:
        # Scaled weights are no whole numbers any more: 8 bits of them, about 0.4 % of the largest.
        assert np.abs(np.asarray(shifted(x)) - exact).max() < 2e-2 * np.abs(exact).max()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_unchanged_before_inputs_are_rounded(bias):
    layer = whole_numbers(Linear(6, 4, role="query", axes=(None, None), key=jax.random.key(0), bias=bias))
    x, fit = inputs((2, 7, 6)), FitShift()
    scheme = LayerScheme(WEIGHT, None, fit.names)
    shifted = quantize_layer(layer, scheme, execution="simulate", fit=fit, input_range=channel_range(x))
    exact = np.asarray(layer(x))
    np.testing.assert_allclose(shifted(x), exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("execution", ["simulate", "integer"])
@pytest.mark.parametrize("kind", ["3x3", "strided", "over frames"])
def test_rounded_inputs_lose_less_behind_a_shift(kind, execution):
    arguments = CONVOLUTIONS[kind]
    layer = Conv(3, 5, **arguments, role="convolution", axes=(None, None), key=jax.random.key(0))
    layer = whole_numbers(layer)
    x = inputs((2, *(5, 4, 6)[-len(arguments["kernel"]) :], 3))
    exact, errors = layer(x), []
    for fit in (None, FitShift()):
        scheme = LayerScheme(WEIGHT, STATIC, () if fit is None else fit.names)
        quantized = quantize_layer(layer, scheme, execution=execution, fit=fit, input_range=channel_range(x))
        errors.append(float(jnp.square(quantized(x) - exact).mean()))
    # The channels' centres lie some 9 standard deviations apart and around zero; the range of one alone is a third of
    # that or less, so the error's square falls to a ninth. Positions over the border are no exception.
    assert errors[1] < errors[0] / 4


def test_integer_and_simulated_execution_agree_at_borders():
    layer = Conv(3, 5, **CONVOLUTIONS["strided"], role="convolution", axes=(None, None), key=jax.random.key(0))
    x, fit = inputs((2, 5, 7, 3)), FitShift()
    scheme = LayerScheme(Quantizer(4), STATIC, fit.names)
    both = [
        quantize_layer(layer, scheme, execution=execution, fit=fit, input_range=channel_range(x))(x)
        for execution in ("simulate", "integer")
    ]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)  # the same integers, float32 sums of 27 of them


def test_a_stack_is_quantized_layer_by_layer():
    layers = [whole_numbers(Linear(6, 4, role="query", axes=(None, None), key=jax.random.key(0)), i) for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    xs = [inputs((2, 7, 6), seed=i) for i in range(3)]
    low, high = (jnp.stack(edges) for edges in zip(*map(channel_range, xs), strict=True))
    fit = FitShift()
    scheme = LayerScheme(WEIGHT, STATIC, fit.names)
    whole = quantize_layer(stack, scheme, execution="simulate", fit=fit, input_range=(low, high))
    for i, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        alone = quantize_layer(layer, scheme, execution="simulate", fit=fit, input_range=channel_range(x))
        row = jax.tree.map(lambda a, i=i: a[i], whole)
        np.testing.assert_array_equal(row(x), alone(x))


def test_second_moments_of_a_shifted_input_are_refused():
    layer, x = Linear(6, 4, role="query", axes=(None, None), key=jax.random.key(0)), inputs((2, 7, 6))
    fit = FitShift()
    with pytest.raises(UserError, match="once it is shifted"):
        quantize_layer(
            layer, LayerScheme(WEIGHT, STATIC, fit.names), execution="simulate", fit=fit,
            input_range=channel_range(x), rounding=ErrorCompensation(), moment=jnp.eye(6),
        )  # fmt: skip


@pytest.mark.parametrize("shape", ["minmax", "magnitude", "shrink"])
def test_the_searched_range_has_the_least_error_of_its_candidates(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_t(3, (4, 50)), jnp.float32)
    grid, search = Grid(4, symmetric=False), RangeSearch(shape)
    low, high = (float(edge) for edge in search.edges(x, grid))

    def error(low, high):
        scale, zero = grid.from_range(jnp.float32(low), jnp.float32(high))
        return float((jnp.abs(grid.decode(grid.encode(x, scale, zero), scale, zero) - x) ** 2.4).mean())

    widest = float(x.min()), float(x.max())
    largest = max(-widest[0], widest[1])
    step = 2 * largest / 15  # of the widest range at 4 bits; every range is moved by half of its own
    candidates = {
        "minmax": [widest],
        "magnitude": [(-(largest + step / 2) * i / 50, (largest - step / 2) * i / 50) for i in range(1, 51)],
        "shrink": [(widest[0] * i / 100, widest[1] * i / 100) for i in range(50, 101)],
    }[shape]  # fmt: skip
    best = min(error(*candidate) for candidate in candidates)
    assert error(low, high) == pytest.approx(best, rel=1e-5)
    assert any(np.allclose((low, high), candidate, rtol=1e-5) for candidate in candidates)


def test_a_range_of_one_sign_stays_on_its_side():
    x = jnp.linspace(0.5, 3.0, 20)[None]
    low, high = RangeSearch().edges(x, Grid(8, symmetric=False))
    assert low == 0
    assert 2.5 < high <= 3
    low, high = RangeSearch().edges(-x, Grid(8, symmetric=False))
    assert high == 0
    assert -3 <= low < -2.5
