"""GPTQ: the columns of the paper's algorithm, second moments, and what rounding by them gains."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import cogvideox, cogvideox_inputs, wan, wan_inputs

import qvdjax
from qvdjax.calibration.moments import passes, second_moments
from qvdjax.errors import UserError
from qvdjax.nn import LayerScheme, Linear, Rotation
from qvdjax.numerics import Quantizer, quantize
from qvdjax.ptq import ErrorCompensation, FitRotation, quantize_layer
from qvdjax.recipes import get

TOKENS = Quantizer(8, granularity="token", dynamic=True)


def correlated(tokens, width, seed=0):
    """Inputs whose channels are correlated, as those behind a norm are not."""
    random = np.random.default_rng(seed)
    return random.standard_normal((tokens, width)) @ (np.eye(width) + random.standard_normal((width, width)) / 3)


def textbook(weight, moment, quantizer, damping, act_order):
    """Codes by optimal brain surgery in float64: after each column leaves the inverse Hessian (equations 2, 3)."""
    scale, zero_point = (None if a is None else np.asarray(a, np.float64) for a in quantizer.scale_of(weight))
    size, grid = weight.shape[1] // scale.shape[1], quantizer.grid
    weight, moment = weight.astype(np.float64), moment.astype(np.float64)
    inverse = np.linalg.inv(moment + damping * np.diag(moment).mean() * np.eye(len(moment)))
    left = np.argsort(-np.diag(moment), kind="stable") if act_order else np.arange(len(moment))
    codes = np.zeros(weight.shape)
    for i in left:
        step, zero = scale[:, i // size], 0 if zero_point is None else zero_point[:, i // size]
        codes[:, i] = np.clip(np.round(weight[:, i] / step + zero), grid.low, grid.high)
        error = (weight[:, i] - (codes[:, i] - zero) * step) / inverse[i, i]
        weight = weight - np.outer(error, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("quantizer", "block"),
    [
        (Quantizer(4), 5),
        (Quantizer(3, False), 128),
        (Quantizer(3, False, "group", 6), 8),
        (Quantizer(2, True, "tensor"), 1),
    ],
)
def test_codes_are_those_of_the_textbook(quantizer, block, act_order):
    random = np.random.default_rng(3)
    weight, x = random.standard_normal((7, 18)).astype(np.float32), correlated(200, 18)
    moment = (x.T @ x).astype(np.float32)
    options = ErrorCompensation(0.01, act_order, block)
    rounded, factored = jax.jit(lambda w, m: options.round(w, m, quantizer))(weight, moment)
    assert factored
    expected = textbook(weight, moment, quantizer, 0.01, act_order)
    # Float32 against float64: a weight that lies on the border of two codes may fall to the other, and pull later
    # columns along. With these seeds none does.
    chex.assert_trees_all_equal(np.asarray(rounded.codes.astype(jnp.int8)), expected.astype(np.int8))


@hypothesis.given(seed=st.integers(0, 99), bits=st.integers(2, 5), tokens=st.sampled_from([1, 9, 60]))
@hypothesis.settings(max_examples=12)
def test_the_output_error_is_below_that_of_nearest_codes_on_average(seed, bits, tokens):
    random, quantizer = np.random.default_rng(seed), Quantizer(bits)
    weight = random.standard_normal((24, 15)).astype(np.float32)
    x = correlated(tokens, 15, seed).astype(np.float32)
    moment = x.T @ x
    error = lambda q: float(np.square(x @ (np.asarray(q.dequantize()) - weight).T).mean())  # noqa: E731
    rounded, factored = ROUND(weight, moment, quantizer)
    assert factored
    assert error(rounded) < error(quantize(weight, quantizer))  # the mean over 24 output channels


ROUND = jax.jit(ErrorCompensation(block=8).round, static_argnums=2)


def test_a_channel_that_is_never_used_is_rounded_to_the_nearest_code():
    random = np.random.default_rng(0)
    weight, x = random.standard_normal((4, 15)).astype(np.float32), correlated(60, 15)
    x[:, 6] = 0
    quantizer = Quantizer(4)
    rounded, _ = ROUND(weight, (x.T @ x).astype(np.float32), quantizer)
    nearest = quantize(weight, quantizer)
    chex.assert_trees_all_equal(rounded.codes[:, 6].astype(jnp.int8), nearest.codes[:, 6].astype(jnp.int8))
    silent, factored = ROUND(weight, np.zeros((15, 15), np.float32), quantizer)
    assert factored
    chex.assert_trees_all_equal(silent.codes.astype(jnp.int8), nearest.codes.astype(jnp.int8))


def test_a_stack_is_rounded_layer_by_layer_and_behind_its_rotation():
    keys = jax.random.split(jax.random.key(0), 2)
    stack = jax.vmap(lambda k: Linear(12, 5, role="query", axes=("heads", "embed"), key=k))(keys)
    x = np.stack([correlated(50, 12, seed) for seed in (1, 2)]).astype(np.float32)
    moments = np.einsum("l t i, l t j -> l i j", x, x)
    scheme = LayerScheme(Quantizer(3), TOKENS, ("rotation",), rotation=Rotation())
    rounding, fit = ErrorCompensation(), FitRotation()
    layer = quantize_layer(stack, scheme, execution="integer", fit=fit, rounding=rounding, moment=moments)
    for i in range(2):
        transform = fit.fit(stack.weight[...][i], None, None)
        rotated = np.asarray(transform(x[i]))
        expected, _ = rounding.round(transform.on_weight(stack.weight[...][i]), rotated.T @ rotated, Quantizer(3))
        # The same moments but for float32 rounding; a code on a border may fall to the other side.
        assert (np.asarray(layer.codes[...][i]) == np.asarray(expected.codes)).mean() > 0.95
    broken = moments.copy()
    broken[1, 0, 0] = -1e6
    with pytest.raises(UserError, match="damping"):
        quantize_layer(stack, scheme, execution="integer", fit=fit, rounding=rounding, moment=broken)


def test_second_moments_are_those_of_the_inputs():
    model, batches = wan(), [wan_inputs(), wan_inputs(seed=5)]
    names = {"condition_embedder.text_embedder.linear_1", "blocks.1.attn1.to_q", "blocks.2.attn1.to_q"}
    moments = {name: np.asarray(moment) for name, moment in second_moments(model, batches, names)}
    assert moments.keys() == names
    text = np.concatenate([np.asarray(batch["context"]).reshape(-1, 24) for batch in batches])
    # Float32 sums over 28 tokens.
    np.testing.assert_allclose(
        moments["condition_embedder.text_embedder.linear_1"], text.T @ text, rtol=1e-4, atol=1e-4
    )
    streams = 0
    for batch in batches:
        stream, conditioning = model.embed(**batch)
        for i in (0, 1):
            block = jax.tree.map(lambda a, i=i: a[i], model.stacks[0].block)
            table = block.scale_shift_table[...] + conditioning.modulation
            x = block.norm1(stream) * (1 + table[..., 1, :]) + table[..., 0, :]
            stream = block(stream, conditioning)
        rows = np.asarray(x).reshape(-1, 64)
        streams = streams + rows.T @ rows
    # The same float32 operations, fused differently under jit, through one block; sums over 144 tokens.
    np.testing.assert_allclose(moments["blocks.1.attn1.to_q"], streams, rtol=1e-3, atol=0.1)
    with pytest.raises(UserError, match="empty"):
        dict(second_moments(model, [], names))


def test_passes_hold_no_more_than_they_may():
    model = wan()
    names = {name for i in range(3) for name in (f"blocks.{i}.attn1.to_q", f"blocks.{i}.ffn.net.2")}
    narrow, wide = 4 * 64**2, 4 * 96**2
    assert passes(model, names, 1) == [
        [*(f"blocks.{i}.attn1.to_q" for i in range(3)), *(f"blocks.{i}.ffn.net.2" for i in range(3))]
    ]
    limit = (3 * narrow + wide) / 2**30
    assert [len(one) for one in passes(model, names, limit)] == [4, 2]
    assert [len(one) for one in passes(model, names, 1e-9)] == [1] * 6  # each alone is too large, and is done alone


@pytest.mark.slow
def test_models_round_better_than_to_the_nearest_code():
    model, inputs = wan(), wan_inputs()
    run = jax.jit(lambda model: model(**inputs))
    exact = run(model)
    error = lambda quantized: float(jnp.square(run(quantized) - exact).mean())  # noqa: E731
    nearest = error(qvdjax.quantize(model, "rtn-w3a16"))
    once = qvdjax.quantize(model, get("gptq-w3a16"), iter([inputs]))
    assert error(once) < nearest
    assert len(once.stacks) == 1
    memory = 20 * 4 * 64**2 / 2**30  # several passes, which cut the stack in other places
    again = qvdjax.quantize(model, get("gptq-w3a16", memory=memory), [inputs])
    codes = [np.asarray(m.stacks[0].block.ffn.net["2"].codes[...]).astype(np.int8) for m in (once, again)]
    # Moments of passes differ in the last bits.
    assert (codes[0] == codes[1]).mean() > 0.98
    rotated = qvdjax.quantize(model, get("gptq-w4a4", rotation=True, act_order=True, group_size=16), [inputs])
    assert rotated.stacks[0].block.ffn.net["2"].transform.signs is not None
    assert error(rotated) < error(qvdjax.quantize(model, get("quarot-w4a4", group_size=16)))


@pytest.mark.slow
def test_another_family_gains_too():
    model, inputs = cogvideox(), cogvideox_inputs()
    run = jax.jit(lambda model: model(**inputs))
    exact = run(model)
    error = lambda recipe: float(jnp.square(run(qvdjax.quantize(model, recipe, [inputs])) - exact).mean())  # noqa: E731
    nearest = error("rtn-w3a8")
    assert error(get("gptq-w3a8", rotation=True)) < nearest
    assert error(get("svdquant-w3a8", rank=16, gptq=True)) < nearest


def test_what_the_recipe_says():
    recipe = get("gptq-w4a4", damping="0.1", act_order="true")
    assert recipe.rounding == ErrorCompensation(0.1, act_order=True)
    assert (recipe.needs_calibration, recipe.needs_ranges) == (True, False)
    with pytest.raises(UserError, match="damping"):
        get("gptq-w4a4", damping="0")
