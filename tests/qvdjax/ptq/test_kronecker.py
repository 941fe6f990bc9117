"""Kronecker transforms: sizes, the product is kept, folders and other programs read them."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import wan, wan_inputs

import models
import qvdjax
from conversion.stored_layers import stored_layers
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.errors import UserError
from qvdjax.nn import InputTransform, Kronecker, LayerScheme, Linear, Rotation
from qvdjax.numerics import Quantizer
from qvdjax.ptq import FitChannelScale, FitProduct, FitRotation, quantize_layer
from qvdjax.recipes import get

TOKENS = Quantizer(8, granularity="token", dynamic=True)


def test_sizes_of_published_widths():
    """FlatQuant's search finds the same pairs."""
    pairs = {1536: (32, 48), 1920: (40, 48), 3072: (48, 64), 5120: (64, 80), 8960: (80, 112), 13824: (108, 128)}
    assert {width: Kronecker().sizes_of(width) for width in pairs} == pairs
    assert Kronecker().sizes_of(7) == (1, 7)
    assert Kronecker(4).sizes_of(64) == (4, 16)
    with pytest.raises(UserError, match="size 5 does not divide a width of 64; choose a divisor"):
        Kronecker(5).sizes_of(64)
    with pytest.raises(ValueError, match="size 0"):
        Kronecker(0)


@hypothesis.given(width=st.integers(1, 60), rotated=st.booleans(), scaled=st.booleans())
@hypothesis.settings(max_examples=10)
def test_transformed_inputs_times_the_transformed_weight_are_the_product(width, rotated, scaled):
    random = np.random.default_rng(width)
    x, weight = (random.standard_normal((*shape, width)).astype(np.float32) for shape in ((3, 2), (5,)))
    left, right = (
        # Well-conditioned, and not orthogonal.
        jnp.asarray(np.linalg.qr(random.standard_normal((n, n)))[0] * random.uniform(0.5, 2, n), jnp.float32)
        for n in Kronecker().sizes_of(width)
    )
    transform = InputTransform(
        smooth_scale=jnp.asarray(random.uniform(0.3, 3, width), jnp.float32) if scaled else None,
        signs=jnp.ones(width) if rotated else None, rotation=Rotation() if rotated else None, left=left, right=right,
    )  # fmt: skip
    # The definition: x times the Kronecker product, which is written out nowhere else.
    plain = InputTransform(left=left, right=right)
    np.testing.assert_allclose(plain(x), x @ np.kron(left, right), atol=1e-4)
    # Float32 sums of at most 60 terms near 1, through inverses of condition up to 16.
    chex.assert_trees_all_close(transform(x) @ transform.on_weight(weight).T, x @ weight.T, atol=1e-3)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), transform)
    chex.assert_trees_all_close(
        stacked.on_weight(np.stack([weight, weight]))[1], transform.on_weight(weight), atol=1e-4
    )


def test_a_scale_and_a_rotation_are_fitted_together():
    """ViDiT-Q: the rotation comes after the scale."""
    weight = jax.random.normal(jax.random.key(0), (7, 64))
    low, high = -jnp.arange(1.0, 65), jnp.arange(1.0, 65)
    scale, rotation = FitChannelScale(0.5), FitRotation()
    both = FitProduct(scale, rotation).fit(weight, low, high)
    x = jax.random.normal(jax.random.key(1), (3, 64))
    one_after_the_other = rotation.fit(weight, low, high)(scale.fit(weight, low, high)(x))
    chex.assert_trees_all_close(both(x), one_after_the_other, atol=1e-5)
    assert FitProduct(scale, rotation).names == ("smooth_scale", "rotation")
    assert FitProduct(scale, kronecker=Kronecker()).names == ("smooth_scale", "kronecker")


def test_folders_and_other_programs_read_them(tmp_path):
    model = wan()
    quantized = qvdjax.quantize(model, get("flatquant-w8a8", epochs=1, batch=1), [wan_inputs(batch=1)])
    models.save(quantized, tmp_path / "model")
    run = jax.jit(lambda model, inputs: model(**inputs))
    chex.assert_trees_all_equal(run(models.load(tmp_path / "model"), wan_inputs()), run(quantized, wan_inputs()))
    # As programs without transforms would hold it: near the float weight again.
    layer = stored_layers(CheckpointFolder.open(tmp_path / "model"))["blocks.1.attn1.to_k"]
    weight = np.asarray(model.stacks[0].block.attn1.to_k.weight[...][1])
    # Half a step of 1/127 of a row's largest value, spread by a transform near orthogonal.
    assert np.square(layer.weight() - weight).sum() < 1e-3 * np.square(weight).sum()


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="'kronecker' and how it is made belong together"):
        LayerScheme(Quantizer(8), TOKENS, ("kronecker",))
    layer = Linear(96, 7, role="query", axes=("heads", "embed"), key=jax.random.key(0))
    static = LayerScheme(
        Quantizer(8), Quantizer(8, granularity="tensor"), ("kronecker",), kronecker=Kronecker()
    )  # fmt: skip
    with pytest.raises(UserError, match="rotated inputs with a dynamic range"):
        quantize_layer(layer, static, execution="integer", input_range=(jnp.zeros(96), jnp.ones(96)))
