"""A shifted input: the product is the same as without the shift, at borders too, and static ranges follow it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear
from qvdjax.nn.protocol import block_at_timestep
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


def of_two_timesteps(layer, space: tuple[int, ...], *, frames: int = 1):
    """Inputs [(batch frames), *space, in] of three samples at timesteps 900, 100 and 900, each timestep's channels
    elsewhere; ranges by timestep, ascending; and those timesteps."""
    xs = {t: inputs((frames, *space, layer.weight[...].shape[1]), seed=int(t)) for t in (100.0, 900.0)}
    low, high = (jnp.stack(edges) for edges in zip(*(channel_range(xs[t]) for t in sorted(xs)), strict=True))
    # 899 is nobody's: the nearest counts.
    return jnp.concatenate([xs[900.0], xs[100.0], xs[900.0]]), (low, high), jnp.array([900.0, 100.0, 899.0])


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("kind", ["linear", *CONVOLUTIONS])
def test_shifts_of_timesteps_change_nothing_before_inputs_are_rounded(kind, frames):
    common = {"axes": (None, None), "key": jax.random.key(0)}
    if kind == "linear":
        layer, space = whole_numbers(Linear(6, 4, role="query", **common)), (7,)
    else:
        layer = whole_numbers(Conv(3, 5, **CONVOLUTIONS[kind], role="convolution", **common))
        space = (5, 4, 6)[-len(layer.kernel) :]
    x, ranges, timestep = of_two_timesteps(layer, space, frames=frames)
    fit = FitShift()
    scheme = LayerScheme(WEIGHT, None, fit.names, shift_timesteps=(100.0, 900.0))
    shifted = quantize_layer(layer, scheme, execution="simulate", fit=fit, input_range=ranges)
    found, exact = block_at_timestep(shifted, timestep)(x), np.asarray(layer(x))
    # float32 sums of up to 27 products of 127 and 30
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
    other = np.asarray(block_at_timestep(shifted, timestep[::-1] * 0 + 100.0)(x))
    np.testing.assert_allclose(other, exact, atol=1e-4 * np.abs(exact).max())  # any shift is given back


@pytest.mark.parametrize("execution", ["simulate", "integer"])
@pytest.mark.parametrize("kind", ["linear", "3x3", "strided"])
def test_shifts_of_timesteps_round_each_where_it_lies(kind, execution):
    common = {"axes": (None, None), "key": jax.random.key(0)}
    if kind == "linear":
        layer, space = whole_numbers(Linear(6, 4, role="query", **common)), (7,)
    else:
        layer, space = whole_numbers(Conv(3, 5, **CONVOLUTIONS[kind], role="convolution", **common)), (4, 6)
    x, (low, high), timestep = of_two_timesteps(layer, space)
    fit, exact = FitShift(), layer(x)
    each = LayerScheme(WEIGHT, STATIC, fit.names, shift_timesteps=(100.0, 900.0))
    one = dataclasses.replace(each, shift_timesteps=None)
    ways = ((each, (low, high)), (one, (low.min(axis=0), high.max(axis=0))))
    errors = []
    for scheme, ranges in ways:
        quantized = quantize_layer(layer, scheme, execution=execution, fit=fit, input_range=ranges)
        errors.append(float(jnp.square(block_at_timestep(quantized, timestep)(x) - exact).mean()))
    # Timesteps lie some 9 deviations apart in every channel, which one shift for both leaves in the range.
    assert errors[0] < errors[1] / 3


def test_a_scale_behind_shifts_of_timesteps_is_of_all_of_them():
    layer = whole_numbers(Linear(6, 4, role="query", axes=(None, None), key=jax.random.key(0)))
    x, (low, high), timestep = of_two_timesteps(layer, (7,))
    fit = FitShift(FitChannelScale(1.0))
    made = fit.fit(layer.weight[...], low, high)
    np.testing.assert_allclose(made.shift[...], (low + high) / 2)
    half = ((high - low) / 2).max(axis=0)
    # alpha 1 divides each channel by the largest that any timestep leaves of it
    np.testing.assert_allclose(made.smooth_scale[...], half, rtol=1e-5)
    scheme = LayerScheme(Quantizer(8, granularity="channel"), None, fit.names, shift_timesteps=(100.0, 900.0))
    shifted = quantize_layer(layer, scheme, execution="simulate", fit=fit, input_range=(low, high))
    exact = np.asarray(layer(x))
    # Scaled weights are no whole numbers any more: 8 bits of them, about 0.4 % of the largest.
    assert np.abs(np.asarray(block_at_timestep(shifted, timestep)(x)) - exact).max() < 2e-2 * np.abs(exact).max()


def test_shifts_of_timesteps_in_a_stack():
    layers = [whole_numbers(Linear(6, 4, role="query", axes=(None, None), key=jax.random.key(0)), i) for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x, ranges, timestep = of_two_timesteps(layers[0], (7,))
    fit = FitShift()
    scheme = LayerScheme(WEIGHT, STATIC, fit.names, shift_timesteps=(100.0, 900.0))
    of_layers = tuple(jnp.stack([edge] * 3) for edge in ranges)
    whole = quantize_layer(stack, scheme, execution="simulate", fit=fit, input_range=of_layers)
    for i, layer in enumerate(layers):
        alone = quantize_layer(layer, scheme, execution="simulate", fit=fit, input_range=ranges)
        row = jax.tree.map(lambda a, i=i: a[i], whole)
        np.testing.assert_array_equal(*(block_at_timestep(one, timestep)(x) for one in (row, alone)))


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
