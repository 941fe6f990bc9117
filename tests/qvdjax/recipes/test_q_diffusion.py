"""Ranges of their own for the parts of a convolution's input: as two convolutions would compute, stored, and found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx

import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, QuantizedConv, Stack, VideoModel, layers_of
from qvdjax.numerics import Grid, Quantizer
from qvdjax.ptq import RangeSearch, quantize_layer
from qvdjax.recipes import decide, get

PARTS = (3, 2)
PADDED = {"kernel": (3, 3), "padding": ((1, 1), (1, 1))}


def conv(channels=sum(PARTS), parts=PARTS, seed=0):
    """A convolution whose weights differ in size between the parts of its input."""
    layer = Conv(channels, 4, **PADDED, role="convolution", axes=(None, None), key=jax.random.key(seed), parts=parts)
    if parts is not None:
        layer.weight[...] = layer.weight[...].at[:, PARTS[0] :].multiply(20)
        layer.bias[...] = jnp.arange(4.0)
    return layer


def inputs(seed: int = 0, samples: int = 2) -> jax.Array:
    """The second part is much smaller than the first."""
    x = jax.random.normal(jax.random.key(seed), (samples, 4, 6, sum(PARTS)))
    return x * jnp.array([1.0] * PARTS[0] + [0.05] * PARTS[1])


def alone(layer: Conv, start: int, end: int) -> Conv:
    """The convolution of some channels, without bias."""
    part = conv(end - start, None)
    part.weight[...], part.bias = layer.weight[...][:, start:end], None
    return part


@pytest.mark.parametrize("weight", [Quantizer(4), Quantizer(4, symmetric=False, range_method="search")])
@pytest.mark.parametrize("activation", [
    None, Quantizer(8, granularity="tensor", dynamic=True), Quantizer(8, False, granularity="tensor"),
])  # fmt: skip
def test_parts_are_computed_as_convolutions_of_their_own(weight, activation):
    layer, x = conv(), inputs()
    edges = (jnp.array([-2.0, -0.1]), jnp.array([3.0, 0.2])) if activation and not activation.dynamic else None
    found = [
        quantize_layer(layer, LayerScheme(weight, activation, split=PARTS), execution=execution, edges=edges)
        for execution in ("simulate", "integer")
    ]
    wanted, whole = jnp.arange(4.0), []
    for number, (start, end) in enumerate(((0, 3), (3, 5))):
        own = None if edges is None else tuple(edge[number] for edge in edges)
        part = quantize_layer(
            alone(layer, start, end), LayerScheme(weight, activation), execution="simulate", edges=own
        )
        wanted = wanted + part(x[..., start:end])
        whole.append(part.qweight.dequantize())
    # The same integers; float32 sums of 45 products.
    for one in found:
        np.testing.assert_allclose(one(x), wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found[0].qweight.dequantize(), jnp.concatenate(whole, axis=-1))


def test_parts_of_different_size_lose_less_with_ranges_of_their_own():
    layer, x = conv(), inputs()
    edges = [(parts.min(), parts.max()) for parts in (x, x[..., :3], x[..., 3:])]
    own = tuple(jnp.stack(ends) for ends in zip(*edges[1:], strict=True))
    activation = Quantizer(8, False, "tensor")
    errors = [
        float(jnp.square(quantize_layer(layer, scheme, execution="simulate", edges=e)(x) - layer(x)).mean())
        for scheme, e in (
            (LayerScheme(Quantizer(4), activation, split=PARTS), own),
            (LayerScheme(Quantizer(4), activation), edges[0]),
        )
    ]
    # Weights of the first part are a twentieth of the second's: on its 15 levels they are nearly all rounded to zero.
    assert errors[0] < 0.1 * errors[1]


class Block(nnx.Module):
    """One convolution of every frame."""

    def __init__(self):
        self.conv = conv()

    def __call__(self, x, conditioning):
        return self.conv(x)


class Model(VideoModel):
    """Latents of one video to outputs, by one convolution."""

    def __init__(self):
        self.stacks = nnx.List([Stack(Block(), prefix="block")])

    def embed(self, latents, timestep, context):
        return latents[0], None

    def head(self, stream, conditioning):
        return stream[None]


def test_ranges_are_searched_for_part_by_part():
    batches = [
        {"latents": inputs(seed)[None], "timestep": jnp.ones(1), "context": jnp.zeros((1, 1, 1))} for seed in (1, 2)
    ]
    quantized = qvdjax.quantize(Model(), get("q-diffusion-w8a6", learn=False), batches)
    [(_, _, layer)] = layers_of(quantized, (QuantizedConv,))
    assert layer.scheme.split == PARTS
    search, grid = RangeSearch("shrink"), Grid(6, symmetric=False)
    for number, channels in enumerate((slice(0, 3), slice(3, 5))):
        calls = [search.edges(batch["latents"][..., channels], grid) for batch in batches]
        low, high = (jnp.stack(ends) for ends in zip(*calls, strict=True))
        scale, zero_point = grid.from_range(low.min(), high.max())  # the widest of the calls
        np.testing.assert_allclose(layer.input_scale[...][number], scale, rtol=1e-6)
        np.testing.assert_array_equal(layer.input_zero_point[...][number, 0], zero_point)
    [row] = qvdjax.describe(quantized)
    assert "2 arrays, each with ranges of its own" in row["reason"]
    for batch in batches:
        exact = Model()(**batch)
        assert float(jnp.square(quantized(**batch) - exact).mean() / jnp.square(exact).mean()) < 1e-2  # six bits


def test_without_a_search_ranges_are_the_widest_of_each_part():
    batch = {"latents": inputs()[None], "timestep": jnp.ones(1), "context": jnp.zeros((1, 1, 1))}
    quantized = qvdjax.quantize(Model(), get("minmax-w8a8", split_inputs=True), [batch])
    [(_, _, layer)] = layers_of(quantized, (QuantizedConv,))
    widest = [float(jnp.abs(batch["latents"][..., part]).max()) / 127 for part in (slice(0, 3), slice(3, 5))]
    np.testing.assert_allclose(layer.input_scale[...][:, 0], widest, rtol=1e-6)


@pytest.mark.parametrize("family", ["UNET", "UNET_3D", "UNET_SPATIO_TEMPORAL"])
def test_layers_that_read_a_skip_connection(family):
    model = models.abstract(getattr(small_models, family))
    split = {name: s.split for name, s in decide(model, get("q-diffusion-w8a8")).schemes.items()
             if getattr(s, "split", None) is not None}  # fmt: skip
    names = {f"up_blocks.{level}.resnets.{number}" for level in (0, 1) for number in (0, 1)}
    inner = ".spatial_res_block" if family == "UNET_SPATIO_TEMPORAL" else ""
    assert set(split) == {f"{name}{inner}.{layer}" for name in names for layer in ("conv1", "conv_shortcut")}
    low, high = model.config.block_out_channels
    wanted = {"0.resnets.0": (high, high), "0.resnets.1": (high, low), "1.resnets.0": (high, low),
              "1.resnets.1": (low, low)}  # fmt: skip
    assert all(split[f"up_blocks.{place}{inner}.conv1"] == parts for place, parts in wanted.items())


def test_a_folder_keeps_the_parts(tmp_path):
    one_level = {
        "block_out_channels": [16], "down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"],
    }  # fmt: skip
    recipe = get("rtn-w4a8", split_inputs=True, skip=r".*(motion_modules|attentions).*")
    model = qvdjax.quantize(small_models.unet(**one_level), recipe)
    models.save(model, tmp_path / "out")
    loaded = models.load(tmp_path / "out")
    layers = [
        {names[0]: layer for names, _, layer in layers_of(one, (QuantizedConv,)) if layer.scheme.split}
        for one in (model, loaded)
    ]  # fmt: skip
    assert len(layers[0]) == 4  # two convolutions in each of two ResNets
    for name, layer in layers[0].items():
        other = layers[1][name]
        assert other.scheme == layer.scheme
        assert layer.weight_scale[...].shape[-1] == 2
        np.testing.assert_array_equal(other.qweight.dequantize(), layer.qweight.dequantize())


@pytest.mark.parametrize("name", ["qvd-w8a8", "rtn-w4a4", "lsq-w4a4"])
def test_what_does_not_go_together(name):
    option = {"qvd-w8a8": {"frame_ranges": True}, "rtn-w4a4": {"average_bits": 4.0}, "lsq-w4a4": {}}[name]
    with pytest.raises(UserError, match="parts"):
        get(name, split_inputs=True, **option)
