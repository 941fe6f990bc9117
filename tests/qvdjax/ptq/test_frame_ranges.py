"""Ranges of frames: which rows have whose, how they are searched for, and that both executions use them alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.nn import Conv, LayerScheme, Linear
from qvdjax.nn.frames import by_frame, for_input
from qvdjax.numerics import Grid, Quantizer, fake_quantize
from qvdjax.ptq import RangeSearch, quantize_layer

FRAMES = 3
GRID = Grid(5, symmetric=False)
# (batch frames) positions channels; batch (frames positions) channels; batch frames positions channels
LAYOUTS = {"frames lead": ((6, 4, 5), 0), "frames and positions": ((2, 12, 5), 1), "a frame axis": ((2, 3, 4, 5), 1)}


def frames_apart(shape, axis) -> jax.Array:
    """Inputs whose frames are one, two and three times as large, and centred elsewhere."""
    numbers = for_input(jnp.arange(1.0, FRAMES + 1)[:, None], axis, shape)
    random = np.random.default_rng(0)
    return numbers * jnp.asarray(random.standard_normal(shape) + 0.5, jnp.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_gets_the_number_of_its_frame(layout):
    shape, axis = LAYOUTS[layout]
    frames = np.broadcast_to(np.arange(FRAMES)[None, :, None, None], (2, FRAMES, 4, 5))  # b f p c
    numbers = np.asarray(for_input(jnp.arange(FRAMES)[:, None], axis, shape))
    assert numbers.ndim == len(shape)
    np.testing.assert_array_equal(np.broadcast_to(numbers, shape), frames.reshape(shape))
    np.testing.assert_array_equal(by_frame(jnp.asarray(frames.reshape(shape)), axis, FRAMES), frames.reshape(2, 3, 20))


@pytest.mark.parametrize("shape", ["shrink", "minmax"])
def test_the_searched_ranges_share_the_factor_of_least_error(shape):
    x = by_frame(frames_apart((6, 40, 5), 0), 0, FRAMES)
    low, high = RangeSearch(shape, norm=2.4).edges_by_frame(x, Grid(3, symmetric=False))
    # The ends of a frame are the means of its samples' ends: NumPy's, in the same float32.
    ends = [np.asarray(f(x, axis=-1)).mean(axis=0) for f in (jnp.min, jnp.max)]

    def error(factor):
        scale, zero = Grid(3, symmetric=False).from_range(*(jnp.asarray(factor * e)[:, None] for e in ends))
        return float((jnp.abs(fake_quantize(x, Grid(3, symmetric=False), scale, zero) - x) ** 2.4).mean())

    factors = [1.0] if shape == "minmax" else [i / 100 for i in range(50, 101)]
    best = min(factors, key=error)
    assert shape == "minmax" or best < 1
    np.testing.assert_allclose([low, high], [best * e for e in ends], rtol=1e-6)


def layer_and_scheme(axis, kind=Linear, weight=Quantizer(8)):
    common = {"role": "query", "axes": (None, None), "key": jax.random.key(0), "frame_axis": axis}
    layer = Linear(5, 4, **common) if kind is Linear else Conv(5, 4, (3, 3), padding=((1, 1), (1, 1)), **common)
    return layer, LayerScheme(weight, Quantizer(5, False, "frame", frames=FRAMES))


@pytest.mark.parametrize("execution", ["simulate", "integer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linear_layer_rounds_each_frame_in_its_range(layout, execution):
    shape, axis = LAYOUTS[layout]
    layer, scheme = layer_and_scheme(axis, weight=Quantizer(8, symmetric=False))
    edges = (jnp.array([-1.0, -3, -6]), jnp.array([2.0, 4, 7]))
    quantized = quantize_layer(layer, scheme, execution=execution, edges=edges)
    x = frames_apart(shape, axis)
    scale, zero = GRID.from_range(*edges)  # [frames]
    weight = quantized.qweight.dequantize()
    rounded = fake_quantize(by_frame(x, axis, FRAMES), GRID, scale[:, None], zero[:, None]).reshape(x.shape)
    np.testing.assert_allclose(quantized(x), jnp.matmul(rounded, weight.T), atol=1e-5)  # float32 sums of five


@pytest.mark.parametrize("execution", ["simulate", "integer"])
def test_a_convolution_rounds_each_frame_in_its_range(execution):
    layer, scheme = layer_and_scheme(0, Conv)
    x = frames_apart((6, 4, 6, 5), 0)
    edges = (jnp.array([-1.0, -3, -6]), jnp.array([2.0, 4, 7]))
    quantized = quantize_layer(layer, scheme, execution=execution, edges=edges)
    for frame in range(FRAMES):
        alone = LayerScheme(scheme.weight, Quantizer(5, False, "tensor"))
        one = quantize_layer(layer, alone, execution="simulate", edges=tuple(edge[frame] for edge in edges))
        # The frame's samples, one a video of the batch; float32 sums of 45 products.
        np.testing.assert_allclose(quantized(x)[frame::FRAMES], one(x[frame::FRAMES]), atol=1e-4)


def test_each_frame_in_its_own_range_loses_less():
    x, (layer, scheme) = frames_apart((6, 4, 5), 0), layer_and_scheme(0)
    parts = by_frame(x, 0, FRAMES)
    own = (parts.min(axis=(0, 2)), parts.max(axis=(0, 2)))
    shared = (own[0].min(), own[1].max())
    whole = LayerScheme(scheme.weight, Quantizer(5, False, "tensor"))
    errors = [
        float(jnp.square(quantize_layer(layer, s, execution="simulate", edges=e)(x) - layer(x)).mean())
        for s, e in ((scheme, own), (whole, shared))
    ]
    # Steps of 1/3, 2/3 and 1 of the shared one: 14/27 of its error, were rounding of the input all there is.
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("wrong", [
    {"dynamic": True}, {"frames": 0, "dynamic": False}, {"granularity": "tensor", "frames": 3},
])  # fmt: skip
def test_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match="frames"):
        Quantizer(**{"bits": 8, "granularity": "frame", **wrong})
