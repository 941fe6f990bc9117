"""Low-rank branches beside quantized products."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import wan, wan_inputs

import qvdjax
from qvdjax.checkpoint.variables import parameter_count
from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear, LowRank
from qvdjax.numerics import Quantizer
from qvdjax.parallel import make_mesh, place
from qvdjax.ptq import FitChannelScale, quantize_layer, set_execution
from qvdjax.ptq.low_rank import leading_directions
from qvdjax.recipes import decide, get

run = jax.jit(lambda model, inputs: model(**inputs))
TOKENS = Quantizer(8, granularity="token", dynamic=True)


def relative_error(candidate, reference) -> float:
    return float(jnp.square(candidate - reference).sum() / jnp.square(reference).sum())


def linear(width=24, out=10, dtype=jnp.float32):
    return Linear(width, out, role="query", axes=("heads", "embed"), key=jax.random.key(0), dtype=dtype)


def scheme(rank, **fields):
    return LayerScheme(**{"weight": Quantizer(4), "activation": TOKENS, "low_rank": LowRank(rank), **fields})


@hypothesis.given(out=st.sampled_from([1, 9, 21]), width=st.sampled_from([5, 21]), rank=st.integers(1, 5))
@hypothesis.settings(max_examples=8)
def test_directions_are_those_of_the_singular_value_decomposition(out, width, rank):
    weight = np.random.default_rng(out * width).standard_normal((out, width)).astype(np.float32)
    rank = min(rank, out, width)
    down, up = leading_directions(jnp.asarray(weight), rank)
    assert (down.shape, up.shape) == ((rank, width), (out, rank))
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    # Eigenvectors of the squared weight in float32: errors of 1e-6 over the gap between neighbouring values squared.
    chex.assert_trees_all_close(up @ down, best, atol=2e-3)


def test_full_rank_is_the_float_layer():
    x = jax.random.normal(jax.random.key(1), (2, 5, 24))
    for out in (10, 24, 31):
        layer = linear(out=out)
        full = quantize_layer(layer, scheme(99), execution="integer")
        assert full.low_rank.rank == min(out, 24)
        # What is left to round is float32 rounding of sums of 24 terms.
        chex.assert_trees_all_close(full(x), layer(x), atol=1e-4)


def test_error_falls_with_the_rank():
    layer, x = linear(24, 16), jax.random.normal(jax.random.key(1), (40, 24))
    float_inputs = {"activation": None}
    errors = [relative_error(quantize_layer(layer, scheme(r, **float_inputs), execution="integer")(x), layer(x))
              for r in (1, 4, 8, 12, 16)]  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    none = quantize_layer(layer, LayerScheme(Quantizer(4)), execution="integer")
    assert errors[0] < relative_error(none(x), layer(x))
    assert errors[-1] < 1e-9


def test_the_signal_to_noise_ratio_is_that_of_both_parts():
    layer = quantize_layer(linear(), scheme(3), execution="integer")
    weight = np.asarray(linear().weight[...])
    held = np.asarray(layer.low_rank.up[...] @ layer.low_rank.down[...] + layer.qweight.dequantize())
    expected = 10 * np.log10((weight**2).sum() / ((weight - held) ** 2).sum())
    np.testing.assert_allclose(layer.weight_sqnr_db[...], expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_integer_and_simulated_execution_agree(dtype):
    x = jax.random.normal(jax.random.key(1), (2, 5, 24), dtype)
    edges = (x.min(axis=(0, 1)), x.max(axis=(0, 1)))
    choice = scheme(4, transforms=("smooth_scale",))
    integer, simulated = (
        quantize_layer(linear(dtype=dtype), choice, execution=e, fit=FitChannelScale(0.5), input_range=edges)
        for e in ("integer", "simulate")
    )
    assert integer.low_rank.up[...].dtype == dtype
    assert integer(x).dtype == dtype
    # Float32 sums of 24 terms near 1, and the last bit of bfloat16 (a 256th) of outputs below 4.
    chex.assert_trees_all_close(integer(x), simulated(x), atol=1e-5 if dtype == jnp.float32 else 0.02)


def test_a_sharded_layer_gives_the_same():
    layer = Linear(96, 16, role="feed_forward_out", axes=("embed", "mlp"), key=jax.random.key(0))
    quantized = quantize_layer(layer, scheme(4), execution="integer")
    x = jax.random.normal(jax.random.key(1), (2, 4, 96))
    sharded = place(quantized, make_mesh({"fsdp": 2, "tensor": 4}))
    assert not sharded.low_rank.down[...].sharding.is_fully_replicated
    assert not sharded.low_rank.up[...].sharding.is_fully_replicated
    # The same codes, since ranges are exact; float32 sums of 96 terms in another order.
    chex.assert_trees_all_close(jax.jit(lambda m, x: m(x))(sharded, x), quantized(x), atol=1e-4)


def test_whole_models():
    model, inputs = wan(), wan_inputs()
    exact = run(model, inputs)
    # Modulation has no branch and would drown the rest at three bits.
    options = {"skip": r"condition_embedder\.time_proj"}
    quantized = qvdjax.quantize(model, get("svdquant-w3a8", rank=16, **options), [inputs], execution="integer")
    smooth = qvdjax.quantize(model, get("smoothquant-w3a8", **options), [inputs])
    assert relative_error(run(quantized, inputs), exact) < 0.9 * relative_error(run(smooth, inputs), exact)
    assert parameter_count(quantized) == parameter_count(model)
    simulated = set_execution(nnx.clone(quantized), "simulate")
    # Flipped codes of inputs: below (2**-8)**2.
    assert relative_error(run(simulated, inputs), run(quantized, inputs)) < 1e-5
    row = next(row for row in qvdjax.describe(quantized) if row["path"] == "blocks.1.ffn.net.2")
    assert row["online"] == {
        "transforms": ["smooth_scale"], "rotation_block": None, "center_bits": None, "rank": 16,
        "branch_bytes": 4 * 16 * (96 + 64), "multiply_adds": 96 + 16 * (96 + 64),
        "share": (96 + 16 * (96 + 64)) / (96 * 64),
    }  # fmt: skip
    # Codes of three bits, scales, bias, channel scale, branch.
    assert row["bytes"] == 64 * 96 * 3 // 8 + 64 * 4 + 64 * 4 + 96 * 4 + row["online"]["branch_bytes"]
    compensated = qvdjax.quantize(model, get("svdquant-w3a8", rank=16, gptq=True, **options), [inputs])
    assert relative_error(run(compensated, inputs), exact) < relative_error(run(quantized, inputs), exact)


def test_options_of_the_recipe():
    schemes = decide(wan(), get("svdquant-w4a4", narrow_below="65")).schemes
    assert schemes["blocks.0.attn1.to_q"].low_rank.rank_of((64, 64)) == 8
    assert schemes["blocks.0.attn1.to_q"].low_rank.rank_of((96, 70)) == 32
    assert schemes["condition_embedder.time_proj"].low_rank is None
    with pytest.raises(UserError, match="at least 1"):
        get("svdquant-w4a4", rank="0")


def test_what_is_refused():
    with pytest.raises(ValueError, match="quantized weight"):
        LayerScheme(None, TOKENS, low_rank=LowRank())
    conv = Conv(3, 4, (1, 1), role="convolution", axes=("embed", None), key=jax.random.key(0))
    with pytest.raises(UserError, match="branch"):
        quantize_layer(conv, LayerScheme(Quantizer(4), low_rank=LowRank()), execution="integer")
