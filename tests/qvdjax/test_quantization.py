"""Quantizing, describing and calibrating whole models."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import WAN, wan, wan_inputs, wan_with_heavy_text

import models
import qvdjax
from qvdjax.calibration import input_ranges
from qvdjax.errors import UserError
from qvdjax.ptq import set_execution
from qvdjax.qat import fake_quantized
from qvdjax.recipes import decide, get

run = jax.jit(lambda model, inputs: model(**inputs))


def relative_error(candidate, reference) -> float:
    return float(jnp.square(candidate - reference).sum() / jnp.square(reference).sum())


@pytest.fixture(scope="module")
def model():
    return wan()


@pytest.fixture(scope="module")
def inputs():
    return wan_inputs()


def test_fewer_bits_cost_more(model, inputs):
    exact = run(model, inputs)
    errors = [
        relative_error(run(qvdjax.quantize(model, f"rtn-{b}"), inputs), exact) for b in ("w8a8", "w6a6", "w4a4", "w3a3")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3  # two operands of 8 bits through three blocks: (2**-8)**2 a layer


def test_integer_and_simulated_models_agree(model, inputs):
    """The same codes but where a float32 difference of an earlier layer flips one; each flip is one step of a layer."""
    quantized = qvdjax.quantize(model, "rtn-w8a8", execution="integer")
    simulated = set_execution(nnx.clone(quantized), "simulate")
    assert relative_error(run(simulated, inputs), run(quantized, inputs)) < 1e-5  # flips: below (2**-8)**2


def test_the_given_model_is_left_as_it_is(model, inputs):
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(model)]
    qvdjax.quantize(model, "smoothquant-w4a4", [inputs])
    chex.assert_trees_all_equal(before, [np.asarray(leaf) for leaf in jax.tree.leaves(model)])


def test_quantizing_twice_is_refused(model):
    with pytest.raises(UserError, match="already"):
        qvdjax.quantize(qvdjax.quantize(model, "rtn-w8a8"), "rtn-w4a4")


def test_a_calibrated_recipe_without_calibration_is_refused(model):
    with pytest.raises(UserError, match="calibration"):
        qvdjax.quantize(model, "minmax-w8a8")
    with pytest.raises(UserError, match="empty"):
        qvdjax.quantize(model, "minmax-w8a8", [])


def test_ranges_are_those_of_the_inputs(model, inputs):
    """The first layer of the first block sees modulated, normalised tokens: computed here by hand."""
    other = wan_inputs(seed=5)
    ranges = input_ranges(model, [inputs, other])
    assert len(ranges) == 3 * 10 + 7
    lows, highs = [], []
    for batch in (inputs, other):
        stream, conditioning = model.embed(**batch)
        block = jax.tree.map(lambda a: a[0], model.stacks[0].block)
        table = block.scale_shift_table[...] + conditioning.modulation
        x = block.norm1(stream) * (1 + table[..., 1, :]) + table[..., 0, :]
        lows.append(x.min(axis=(0, 1)))
        highs.append(x.max(axis=(0, 1)))
    low, high = ranges["blocks.0.attn1.to_q"]
    # The same float32 operations, fused differently under jit.
    np.testing.assert_allclose(low, jnp.minimum(*lows), atol=1e-4)
    np.testing.assert_allclose(high, jnp.maximum(*highs), atol=1e-4)
    np.testing.assert_array_equal(low, ranges["blocks.0.attn1.to_k"][0])
    text = np.asarray(inputs["context"])
    outer = np.maximum(text.max(axis=(0, 1)), np.asarray(other["context"]).max(axis=(0, 1)))
    np.testing.assert_allclose(ranges["condition_embedder.text_embedder.linear_1"][1], outer, rtol=1e-6)


def test_smoothing_inverts_a_folded_scale(inputs):
    """Heavy text channels, undone in the layers that read them: rounding by token suffers, SmoothQuant does not."""
    model = wan_with_heavy_text()
    exact = run(model, inputs)
    # One function: float32 sums of terms sixty times larger, through three blocks.
    chex.assert_trees_all_close(exact, run(wan(), inputs), rtol=1e-3, atol=1e-3)
    error = lambda name: relative_error(run(qvdjax.quantize(model, name, [inputs]), inputs), exact)  # noqa: E731
    assert error("smoothquant-w8a4") < 0.7 * error("rtn-w8a4")


def test_description_has_a_row_a_block(model, inputs):
    quantized = qvdjax.quantize(model, get("rtn-w4a8", attention_qk_bits=8))
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    assert len(rows) == 3 * 12 + 7
    row = rows["blocks.2.ffn.net.0.proj"]
    assert (row["role"], row["shape"], row["weight_bits"], row["activation_bits"]) == (
        "feed_forward_in",
        [96, 64],
        4,
        8,
    )
    assert row["bytes"] == 96 * 64 // 2 + 96 * 4 + 96 * 4  # codes, scales, float32 bias
    assert row["float_bytes"] == 2 * (96 * 64 + 96)
    weight = model.stacks[0].block.ffn.net["0"]["proj"].weight[...][2]
    step = jnp.abs(weight).max(axis=1, keepdims=True) / 7
    noise = weight - jnp.round(weight / step) * step
    expected = 10 * np.log10(float((weight**2).sum() / (noise**2).sum()))
    assert row["sqnr_db"] == pytest.approx(expected, abs=0.02)  # rounded to hundredths
    assert row["reason"]
    assert rows["blocks.0.attn1.attention"]["activation_bits"] == 8
    assert list(rows)[0].startswith("blocks.0.")


def test_natural_order():
    model = models.abstract({**WAN, "num_layers": 11})
    paths = [row["path"] for row in qvdjax.describe(model) if row["path"].endswith("attn1.to_q")]
    assert paths == [f"blocks.{i}.attn1.to_q" for i in range(11)]


def test_abstract_models_are_quantized_without_memory():
    config = {"_class_name": "WanTransformer3DModel"}  # 14 billion parameters
    quantized = jax.eval_shape(lambda: qvdjax.quantize(models.build(config, dtype=jnp.bfloat16), "rtn-w4a8"))
    rows = [row for row in qvdjax.describe(quantized) if row["path"].startswith("blocks")]
    assert len(rows) == 40 * 10
    assert sum(row["bytes"] for row in rows) <= 0.28 * sum(row["float_bytes"] for row in rows)


def test_training_rounds_as_the_quantized_model_does(model, inputs):
    recipe = get("rtn-w4a4")
    trained = fake_quantized(model, decide(model, recipe).schemes)
    chex.assert_trees_all_close(
        run(trained, inputs), run(qvdjax.quantize(model, recipe, execution="simulate"), inputs), rtol=1e-4, atol=1e-4
    )  # the same float32 operations, compiled differently


def test_training_reaches_every_quantized_weight(model, inputs):
    recipe = get("rtn-w4a4")
    schemes = decide(model, recipe).schemes
    gradients = jax.jit(jax.grad(lambda m: jnp.square(fake_quantized(m, schemes)(**inputs)).mean()))(model)
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        assert jnp.isfinite(gradient[...]).all(), path
        if path[-1] == "weight":
            assert (gradient[...] != 0).any(), path


def test_what_training_refuses(model):
    for name in ("minmax-w8a8", "smoothquant-w4a4"):
        with pytest.raises(UserError, match="calibration"):
            fake_quantized(model, decide(model, get(name)).schemes)
