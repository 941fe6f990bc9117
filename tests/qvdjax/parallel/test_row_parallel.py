import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.kernels import quantized_matmul
from qvdjax.numerics import Quantizer, quantize
from qvdjax.parallel import make_mesh, row_parallel

TOKEN = Quantizer(8, granularity="token", dynamic=True)


def inputs(weight_quantizer, dtype=jnp.float32):
    kx, kw = jax.random.split(jax.random.key(0))
    # One part of the contraction is much larger than the rest, so that local ranges would differ from the
    # row's.
    x = (jax.random.normal(kx, (4, 8, 64)) * jnp.where(jnp.arange(64) < 16, 10.0, 1.0)).astype(dtype)
    return x, quantize(jax.random.normal(kw, (24, 64)), weight_quantizer)


def on_mesh(x, weight, activation, **options):
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 2, "tensor": 2})):
        return jax.jit(lambda x, w: row_parallel(x, w, activation, **options))(x, weight)


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("activation", [TOKEN, Quantizer(8, granularity="tensor", dynamic=True)])
def test_kept_integers_equal_one_device_bit_for_bit(weight_bits, activation):
    x, weight = inputs(Quantizer(weight_bits))
    codes = quantize(x, activation, jnp.int8)
    alone = quantized_matmul(codes, weight)
    together = on_mesh(x, weight, activation, keep_integers=True)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("symmetric", [True, False])
def test_summed_floats_agree_to_rounding(symmetric):
    activation = Quantizer(8, symmetric=symmetric, granularity="token", dynamic=True)
    x, weight = inputs(Quantizer(8, symmetric=symmetric))
    alone = quantized_matmul(quantize(x, activation, jnp.int8), weight)
    # Two float32 parts summed in some order: a few units in the last place of the largest part.
    np.testing.assert_allclose(
        on_mesh(x, weight, activation), alone, rtol=0, atol=8 * 2**-23 * float(jnp.abs(alone).max())
    )


def test_a_local_range_would_have_been_seen():
    x, weight = inputs(Quantizer(8))
    parts = [
        quantized_matmul(quantize(a, TOKEN, jnp.int8), quantize(w, Quantizer(8)))
        for a, w in zip(jnp.split(x, 2, -1), jnp.split(weight.dequantize(), 2, -1))
    ]
    alone = quantized_matmul(quantize(x, TOKEN, jnp.int8), weight)
    assert float(jnp.abs(sum(parts) - alone).max()) > 1e-3 * float(jnp.abs(alone).max())


def test_groups_and_kept_zero_points_are_refused():
    x, weight = inputs(Quantizer(8, granularity="group", group_size=16))
    with pytest.raises(ValueError, match="no groups"):
        on_mesh(x, weight, TOKEN)
    x, weight = inputs(Quantizer(8, symmetric=False))
    with pytest.raises(ValueError, match="symmetric"):
        on_mesh(x, weight, TOKEN, keep_integers=True)
