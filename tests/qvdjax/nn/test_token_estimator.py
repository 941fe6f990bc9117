"""Estimates beside products: the paper's formula in float64, executions, frames and texts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.nn import EstimatorBranch, LayerScheme, Linear, TokenEstimator
from qvdjax.numerics import Quantizer
from qvdjax.ptq.layers import quantize_layer, quantized_arrays

TOKENS = Quantizer(8, symmetric=False, granularity="token", dynamic=True)
FRAMES = TokenEstimator(rank=2, frames=3, before=1, after=2)  # of nine tokens: text, three frames of two, text, text


def arrays(width=12, out=5, seed=0):
    random = np.random.default_rng(seed)
    return {"down": random.standard_normal((2, width)), "up": random.standard_normal((out, 2)),
            "gain": np.array([0.5, 2.0, -1.0])}  # fmt: skip


def test_the_formula():
    known, x = arrays(), np.random.default_rng(1).standard_normal((2, 9, 12))
    held = {name: jnp.asarray(array, jnp.float32) for name, array in known.items()}
    branch = EstimatorBranch(**held, scheme=FRAMES, axes=("heads", "embed"))
    gains = np.array([1, 0.5, 0.5, 2, 2, -1, -1, 1, 1])
    wanted = np.stack([[gain * known["up"] @ (known["down"] @ token) for gain, token in zip(gains, sample, strict=True)]
                       for sample in x])  # fmt: skip
    # Float32 sums of 12 and of 2 products near one.
    np.testing.assert_allclose(branch(jnp.asarray(x, jnp.float32)), wanted, atol=1e-4)


def quantized(layer, scheme, execution):
    learned = {"estimator": {k: jnp.asarray(v, jnp.float32) for k, v in arrays().items()}}
    made = quantized_arrays(layer.weight[...], scheme, name="layer", learned=learned)
    return quantize_layer(layer, scheme, execution=execution, arrays=made)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("activation", [TOKENS, None])
def test_it_is_added_to_the_product_of_rounded_numbers_in_every_execution(dtype, activation):
    layer = Linear(12, 5, role="query", axes=("heads", "embed"), key=jax.random.key(0), dtype=dtype)
    scheme = LayerScheme(Quantizer(4, symmetric=False), activation, estimator=FRAMES)
    x = jax.random.normal(jax.random.key(1), (2, 9, 12), dtype)
    integer, simulated = (quantized(layer, scheme, execution) for execution in ("integer", "simulate"))
    plain = quantize_layer(layer, LayerScheme(scheme.weight, activation), execution="integer")
    rounded = x if activation is None else integer._rounded(x)
    wanted = plain(x).astype(jnp.float32) + integer.estimator(rounded)
    # Float32 sums of 12 products near one; in bfloat16 its last bit, a 256th of outputs below 16, twice.
    atol = 1e-4 if dtype == jnp.float32 else 0.13
    chex.assert_trees_all_close(integer(x).astype(jnp.float32), wanted, atol=atol)
    chex.assert_trees_all_close(integer(x), simulated(x), atol=1e-4 if dtype == jnp.float32 else 0.07)
    assert integer(x).dtype == dtype
    assert integer.estimator.down[...].dtype == jnp.float32  # like scales, whatever the weights are


def test_a_layer_of_which_nothing_was_learned_is_as_without_one():
    layer = Linear(12, 5, role="query", axes=("heads", "embed"), key=jax.random.key(0))
    scheme = LayerScheme(Quantizer(4), TOKENS, estimator=FRAMES)
    x = jax.random.normal(jax.random.key(1), (2, 9, 12))
    plain = quantize_layer(layer, LayerScheme(Quantizer(4), TOKENS), execution="integer")
    chex.assert_trees_all_equal(quantize_layer(layer, scheme, execution="integer")(x), plain(x))


def test_what_is_refused():
    with pytest.raises(UserError, match="10 tokens, 3 of them text, do not divide into 3 frames; sample videos"):
        FRAMES.of_tokens(jnp.ones(3), 10)
    for wrong in ({"rank": 0}, {"frames": 0}, {"before": 2}, {"frames": 2, "after": -1}):
        with pytest.raises(ValueError, match="at least 1|do not go with"):
            TokenEstimator(**wrong)
    with pytest.raises(ValueError, match="quantized weight"):
        LayerScheme(None, TOKENS, estimator=FRAMES)
    scheme = LayerScheme(Quantizer(4), TOKENS, estimator=FRAMES)
    assert LayerScheme.from_dict(scheme.to_dict()) == scheme
    assert "estimator" not in LayerScheme(Quantizer(4), TOKENS).to_dict()  # older programs go on reading such folders
