"""TCAQ-DM's stand-ins: the scale of convolutions that all timesteps have a say in, by its formula in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import unet, unet_inputs

import qvdjax
from qvdjax.calibration.magnitudes import input_magnitudes
from qvdjax.calibration.ranges import input_ranges
from qvdjax.errors import UserError
from qvdjax.nn import QuantizedConv, QuantizedLinear, layers_of
from qvdjax.ptq import FitEvenChannels
from qvdjax.recipes import get

SMALL = {
    "block_out_channels": [16], "down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"],
}  # fmt: skip


def test_channels_are_divided_by_their_share_of_the_median():
    low, high = jnp.array([-1.0, -8, 0, 0, -2]), jnp.array([2.0, 4, 1, 0, 1])
    # Magnitudes 2, 8, 1, 0, 2; their median is 2.
    scale = FitEvenChannels(0.5).fit(jnp.ones((3, 5)), low, high).smooth_scale[...]
    np.testing.assert_allclose(scale, np.sqrt([1, 4, 0.5, 1e-3, 1]), rtol=1e-6)
    nothing = FitEvenChannels().fit(jnp.ones((3, 2)), jnp.zeros(2), jnp.zeros(2)).smooth_scale[...]
    np.testing.assert_array_equal(nothing, 1)


@pytest.fixture(scope="module")
def small():
    timesteps = jnp.array([999.0, 200.0])
    return unet(**SMALL), [{**unet_inputs(batch=2, seed=seed), "timestep": timesteps} for seed in (0, 1)]


@pytest.mark.slow
def test_convolutions_alone_are_scaled_by_the_mean_of_steps(small):
    model, batches = small
    rows = [{name: array[i : i + 1] for name, array in one.items()} for one in batches for i in range(2)]
    each = [input_ranges(model, [row]) for row in rows]
    found = input_magnitudes(model, batches)
    quantized = qvdjax.quantize(model, get("tcaq-dm-w6a6", learn=False), batches, execution="simulate")
    for names, _, layer in layers_of(quantized, (QuantizedConv, QuantizedLinear)):
        name = names[0]
        largest = np.mean([np.maximum(-low, high) for low, high in (one[name] for one in each)], axis=0)
        # Batches of another size are other float32 programs.
        np.testing.assert_allclose(found[name][1], largest, rtol=1e-4)
        np.testing.assert_array_equal(found[name][0], -found[name][1])
        if isinstance(layer, QuantizedLinear):
            assert layer.transform is None
            continue
        wanted = found[name][1] / np.median(found[name][1])
        np.testing.assert_allclose(layer.transform.smooth_scale[...], wanted, rtol=1e-5)


def test_what_is_refused(small):
    with pytest.raises(UserError, match="use mean or largest"):
        get("tcaq-dm-w6a6", weighing="median")
    with pytest.raises(UserError, match="0 to 1"):
        get("tcaq-dm-w6a6", strength=2.0)
    with pytest.raises(UserError, match="empty"):
        input_magnitudes(small[0], [])
