"""Codebooks: textbook levels, small integers, products of integers, what they gain where values are normal."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import wan, wan_inputs

import models
import qvdjax
from conversion.stored_layers import stored_layers
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.errors import UserError
from qvdjax.kernels import quantized_matmul
from qvdjax.numerics import Grid, Quantizer, encode, fake_quantize, quantize
from qvdjax.numerics.codebook import levels
from qvdjax.ptq import set_execution
from qvdjax.recipes import get

GAUSSIAN = Quantizer(4, granularity="token", codebook="gaussian")


@pytest.mark.parametrize(
    ("bits", "outermost", "innermost", "error"),
    [(2, 1.510, 0.4528, 0.1175), (3, 2.152, 0.2451, 0.03454), (4, 2.733, 0.1284, 0.009497)],
)
def test_levels_are_those_of_max(bits, outermost, innermost, error):
    """Table I of Max, Quantizing for minimum distortion (1960): 4, 8 and 16 levels."""
    whole, step = levels("gaussian", bits)
    real = np.array(whole) * step
    assert len(whole) == 2**bits
    assert whole[-1] == 127
    assert list(whole) == sorted(whole)
    assert real[-1] == pytest.approx(outermost, abs=2e-3)
    # Whole numbers of the largest level / 127: half of one is 0.011 at 16 levels.
    assert real[len(real) // 2] == pytest.approx(innermost, abs=0.011)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 200_000)), jnp.float32)
    found = quantize(x, Quantizer(bits, codebook="gaussian")).dequantize()
    # 200,000 draws: half a percent; rounded levels: another.
    assert float(jnp.square(found - x).mean()) == pytest.approx(error, rel=0.02)


def test_levels_are_told_apart_up_to_seven_bits():
    assert all(len(set(levels("gaussian", bits)[0])) == 2**bits for bits in range(2, 8))
    with pytest.raises(ValueError, match="more levels than int8 can tell apart: use an even grid"):
        levels("gaussian", 8)
    assert get("orbitquant-w8a6").rules[3].scheme.weight == Quantizer(8)


def test_invariants_of_a_qtensor_with_a_codebook():
    x = jax.random.normal(jax.random.key(0), (3, 5, 32)).at[1, 2].set(0)
    for bits in (2, 4, 7):
        quantizer = dataclasses.replace(GAUSSIAN, bits=bits)
        q = quantize(x, quantizer)
        codes = np.asarray(q.codes.astype(jnp.int8))
        assert codes.min() >= -(2 ** (bits - 1))
        assert codes.max() <= 2 ** (bits - 1) - 1
        assert q.zero_point is None
        assert bool(jnp.isfinite(q.scale).all() & (q.scale > 0).all())
        again = encode(q.dequantize(), q.grid, q.scale, None)
        chex.assert_trees_all_equal(again.codes.astype(jnp.int8), q.codes.astype(jnp.int8))
        assert float(jnp.abs(q.dequantize()[1, 2]).max()) < 1e-20  # no level is zero
        chex.assert_trees_all_close(fake_quantize(x, q.grid, q.scale), q.dequantize(), rtol=1e-5, atol=1e-6)


def test_products_are_of_integers():
    x, weight = (jax.random.normal(jax.random.key(key), shape) for key, shape in ((0, (3, 64)), (1, (7, 64))))
    left, right = quantize(x, GAUSSIAN), quantize(weight, Quantizer(4, codebook="gaussian"))
    assert left.operands.dtype == jnp.int8
    exact, simulated = (quantized_matmul(left, right, implementation=how) for how in ("xla", "simulate"))
    chex.assert_trees_all_close(exact, simulated, rtol=1e-4, atol=1e-4)  # float32 sums of 64 terms near 1
    text = jax.jit(quantized_matmul).lower(left, right).as_text()
    assert "tensor<3x64xi8>" in text
    assert "tensor<3x7xi32>" in text


def test_gradients_pass_straight_through():
    x = jax.random.normal(jax.random.key(0), (2, 16))
    scale = GAUSSIAN.scale_of(x)[0]
    x = x.at[0, 3].set(9).at[1, 5].set(-9)  # beyond the outermost levels
    gradient = jax.grad(lambda x: fake_quantize(x, GAUSSIAN.grid, scale).sum())(x)
    inside = jnp.abs(x / scale) <= 127
    assert 2 <= (~inside).sum() < x.size / 2
    chex.assert_trees_all_close(gradient, inside.astype(x.dtype), rtol=1e-5)
    by_scale = jax.grad(lambda s: fake_quantize(x, GAUSSIAN.grid, s).sum())(scale)
    level = encode(x, GAUSSIAN.grid, scale, None).operands.astype(jnp.float32)
    towards = jnp.where(inside, level - x / scale, level)
    chex.assert_trees_all_close(by_scale, towards.sum(axis=-1, keepdims=True), rtol=1e-3, atol=1e-3)


def test_a_model_of_codebooks_is_an_ordinary_one(tmp_path):
    model, inputs = wan(), wan_inputs()
    run = jax.jit(lambda model, inputs: model(**inputs))
    quantized = qvdjax.quantize(model, "orbitquant-w4a4", execution="integer")
    simulated = set_execution(nnx.clone(quantized), "simulate")
    error = lambda a, b: float(jnp.square(a - b).sum() / jnp.square(b).sum())  # noqa: E731
    assert error(run(simulated, inputs), run(quantized, inputs)) < 1e-4  # a flipped code of a thousand
    models.save(quantized, tmp_path / "model")
    loaded = models.load(tmp_path / "model", execution="integer")
    chex.assert_trees_all_equal(run(loaded, inputs), run(quantized, inputs))
    rows = {row["path"]: row["sqnr_db"] for row in qvdjax.describe(quantized) if row["activation_bits"] == 4}
    plain = {row["path"]: row["sqnr_db"] for row in qvdjax.describe(qvdjax.quantize(model, "quarot-w4a4"))}
    # 20.2 dB is what sixteen levels leave of a normal distribution; a grid that spans the largest value less.
    assert all(ratio > plain[path] for path, ratio in rows.items())
    assert np.mean(list(rows.values())) == pytest.approx(-10 * math.log10(0.009497), abs=0.5)
    layer = stored_layers(CheckpointFolder.open(tmp_path / "model"))["blocks.1.ffn.net.2"]
    weight = np.asarray(model.stacks[0].block.ffn.net["2"].weight[...][1])
    assert np.square(layer.weight() - weight).sum() < 0.02 * np.square(weight).sum()


@pytest.mark.slow
def test_every_method_may_have_one():
    assert get("quarot-w4a6", codebook="gaussian").rules == get("orbitquant-w4a6").rules
    model, batches = wan(), [wan_inputs(batch=1)]
    quantized = qvdjax.quantize(model, get("flatquant-w4a4", codebook="gaussian", batch=1, epochs=1), batches)
    assert quantized.stacks[0].block.attn1.to_q.qweight.codebook == "gaussian"
    for name, options in (("lsq-w4a4", {}), ("rtn-w4a4", {"average_bits": 4})):
        with pytest.raises(UserError, match="codebook"):
            get(name, codebook="gaussian", **options)


def test_what_a_codebook_is_not_for_is_refused():
    with pytest.raises(ValueError, match="is symmetric"):
        Quantizer(4, symmetric=False, codebook="gaussian")
    with pytest.raises(ValueError, match="no zero point"):
        Grid(4, symmetric=False, codebook="gaussian")
    with pytest.raises(ValueError, match="no range to search"):
        Quantizer(4, range_method="search", codebook="gaussian")
    with pytest.raises(ValueError, match="unknown codebook 'laplace'"):
        Quantizer(4, codebook="laplace")
    with pytest.raises(ValueError, match="not by a range"):
        GAUSSIAN.grid.from_range(jnp.zeros(1), jnp.ones(1))
