"""Bits of output channels: by kurtosis, codes within each channel's own bits, and kept where the output gains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import ConvThenLinear, OneBlock, growing_latents

import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, layers_of
from qvdjax.numerics import Quantizer, quantize
from qvdjax.ptq.channel_bits import ChannelBits, kurtosis
from qvdjax.recipes import get

RANDOM = np.random.default_rng(0)


def weight(out: int = 10, width: int = 64) -> jax.Array:
    """Rows of normal numbers, of which the first has far outliers, and the last two clusters and nothing else."""
    rows = RANDOM.standard_normal((out, width))
    rows[0, :2] *= 12
    rows[-1] = np.sign(rows[-1]) + 0.1 * rows[-2]
    return jnp.asarray(rows, jnp.float32)


def test_kurtosis_is_the_fourth_moment_over_the_square_of_the_second():
    rows = np.asarray(weight(), np.float64)
    centred = rows - rows.mean(axis=1, keepdims=True)
    wanted = (centred**4).mean(axis=1) / (centred**2).mean(axis=1) ** 2
    np.testing.assert_allclose(kurtosis(jnp.asarray(rows, jnp.float32)), wanted, rtol=1e-4)  # float32 sums
    assert float(kurtosis(jnp.ones((1, 8)))[0]) == 0


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_keep_to_the_bits_of_their_channel(bits, symmetric):
    rows = weight()
    own = np.asarray(ChannelBits(0.1).bits_of(rows, bits))
    order = np.asarray(kurtosis(rows)).argsort()
    wanted = np.full(10, bits)
    wanted[order[-1]], wanted[order[0]] = bits + 1, max(bits - 1, 2)
    np.testing.assert_array_equal(own, wanted)
    found = ChannelBits(0.1).encode(rows, Quantizer(bits, symmetric, range_method="search"))
    assert found.bits == bits + 1
    codes = np.asarray(found.codes, np.int32)
    for row, channel in zip(codes, own, strict=True):
        assert row.min() >= -(2 ** (channel - 1))
        assert row.max() <= 2 ** (channel - 1) - 1
    # Every channel is what a quantizer of its bits makes of it.
    for i, channel in enumerate(own):
        alone = Quantizer(int(channel), symmetric, range_method="search")
        np.testing.assert_allclose(found.dequantize()[i], quantize(rows[i : i + 1], alone).dequantize()[0], rtol=1e-6)


def test_layers_keep_what_their_output_gains_by():
    model, batches = OneBlock(ConvThenLinear()), [growing_latents([900.0, 500.0]), growing_latents([100.0])]
    # One output of the convolution has far outliers and is larger than others: a bit more for it is worth most.
    conv = model.stacks[0].block.conv
    conv.weight[...] = conv.weight[...].at[0].multiply(4).at[0, :2, 1, 1].multiply(10)
    made = {
        share: qvdjax.quantize(model, get("mpq-dm-w3a8", share=share), batches, execution="simulate")
        for share in (0.1, 0.4)
    }
    plain = qvdjax.quantize(model, get("mpq-dm-w3a8", share=0.1, alpha=None), batches, execution="simulate")
    assert all(layer.transform is None for _, _, layer in layers_of(plain, QUANTIZED_LAYERS))
    widths = [layer.scheme.weight.bits for one in made.values() for _, _, layer in layers_of(one, QUANTIZED_LAYERS)]
    assert set(widths) <= {3, 4}
    assert 4 in widths
    for one in made.values():
        rows = {row["path"]: row for row in qvdjax.describe(one)}
        for names, _, layer in layers_of(one, QUANTIZED_LAYERS):
            assert layer.transform is not None
            wide = layer.scheme.weight.bits == 4
            assert ("one bit more" in rows[names[0]]["reason"]) == wide
            assert rows[names[0]]["weight_bits"] == layer.scheme.weight.bits  # what it is stored in
    given = growing_latents([900.0, 100.0], seed=3)
    integer = qvdjax.quantize(model, get("mpq-dm-w3a8"), batches, execution="integer")
    np.testing.assert_allclose(integer(**given), made[0.1](**given), rtol=1e-5, atol=1e-4)  # the same integers


def test_eight_bits_are_the_most():
    model, batches = OneBlock(ConvThenLinear()), [growing_latents([900.0, 100.0])]
    made = qvdjax.quantize(model, get("mpq-dm-w8a8"), batches)
    assert {layer.scheme.weight.bits for _, _, layer in layers_of(made, QUANTIZED_LAYERS)} == {8}


@pytest.mark.parametrize("option", [{"share": 0.0}, {"share": 0.6}, {"average_bits": 4.0}, {"alpha": 2.0}])
def test_what_is_refused(option):
    with pytest.raises(UserError):
        get("mpq-dm-w4a6", **option)
