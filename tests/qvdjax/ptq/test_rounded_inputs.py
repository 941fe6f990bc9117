"""Weights that are fitted to inputs as these are rounded."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import cogvideox, cogvideox_inputs, hunyuanvideo, hunyuanvideo_inputs, wan, wan_inputs

import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import InputClip, Kronecker, LayerScheme
from qvdjax.numerics import Quantizer, fake_quantize_dynamic, quantize
from qvdjax.ptq import ErrorCompensation, FitChannelScale, FitProduct, set_execution
from qvdjax.ptq.gptq import RoundedInputs
from qvdjax.ptq.layers import quantized_arrays
from qvdjax.ptq.rounded_inputs import rounded_inputs
from qvdjax.recipes import get

TOKENS = Quantizer(3, granularity="token", dynamic=True)


def inputs_and_rounded(tokens, width, seed):
    """Inputs whose channels are correlated, at float64, and the same at three bits."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, width)) @ (np.eye(width) + random.standard_normal((width, width)) / 3)
    return x, np.asarray(fake_quantize_dynamic(jnp.asarray(x, jnp.float32), TOKENS), np.float64)


@hypothesis.given(seed=st.integers(0, 99))
@hypothesis.settings(max_examples=10)
def test_the_fit_is_least_squares(seed):
    x, rounded = inputs_and_rounded(90, 11, seed)
    weight = np.random.default_rng(seed).standard_normal((5, 11))
    moments = RoundedInputs(*(jnp.asarray(a, jnp.float32) for a in (rounded.T @ rounded, rounded.T @ x)))
    expected = np.linalg.lstsq(rounded, x @ weight.T, rcond=None)[0].T
    found = moments.fitted(jnp.asarray(weight, jnp.float32), 1e-9)
    # Float32 against float64, through a solve of condition numbers up to some thousands.
    chex.assert_trees_all_close(np.asarray(found), expected, rtol=5e-3, atol=5e-3)
    error = lambda w: np.square(rounded @ np.asarray(w).T - x @ weight.T).sum()  # noqa: E731
    assert error(found) < error(weight)
    # Damping pulls towards the weight.
    chex.assert_trees_all_close(moments.fitted(jnp.asarray(weight, jnp.float32), 1e6), weight, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_exact_or_never_met_leave_the_weight():
    x, _ = inputs_and_rounded(40, 7, 1)
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7)), jnp.float32)
    moment = jnp.asarray(x.T @ x, jnp.float32)
    chex.assert_trees_all_equal(RoundedInputs(moment, moment).fitted(weight, 0.01), weight)
    nothing = jnp.zeros((7, 7))
    chex.assert_trees_all_equal(RoundedInputs(nothing, nothing).fitted(weight, 0.01), weight)


@pytest.mark.parametrize("quantizer", [Quantizer(4), Quantizer(3, False)])
def test_rounding_begins_at_the_fit(quantizer):
    x, rounded = inputs_and_rounded(90, 11, 3)
    weight = jnp.asarray(np.random.default_rng(3).standard_normal((24, 11)), jnp.float32)
    moments = RoundedInputs(*(jnp.asarray(a, jnp.float32) for a in (rounded.T @ rounded, rounded.T @ x)))
    rounding = ErrorCompensation(rounded_inputs=True)
    found, factored = rounding.round(weight, moments, quantizer)
    assert factored
    expected, _ = rounding.round(moments.fitted(weight, 0.01), moments.moment, quantizer)
    chex.assert_trees_all_equal(found.codes, expected.codes)
    error = lambda q: np.square(rounded @ np.asarray(q.dequantize()).T - x @ np.asarray(weight).T).sum()  # noqa: E731
    assert error(found) < error(rounding.round(weight, jnp.asarray(x.T @ x, jnp.float32), quantizer)[0])
    assert error(found) < error(quantize(weight, quantizer))


def test_moments_are_of_inputs_behind_their_transform_as_the_product_gets_them():
    model, batches = wan(), [wan_inputs(), wan_inputs(seed=5)]
    names = [f"blocks.{i}.attn1.to_q" for i in range(3)]
    fit = FitProduct(FitChannelScale(0.3), kronecker=Kronecker())
    scheme = LayerScheme(
        Quantizer(4), TOKENS, ("smooth_scale", "kronecker"), input_clip=InputClip(), kronecker=Kronecker()
    )
    width = 64
    edges = (-jnp.linspace(1, 3, width), jnp.linspace(0.5, 2, width))
    weights = {name: model.stacks[0].block.attn1.to_q.weight[...][i] for i, name in enumerate(names)}

    def made(name):
        return quantized_arrays(weights[name], scheme, name=name, fit=fit, input_range=edges)

    found = dict(rounded_inputs(model, batches, names, dict.fromkeys(names, scheme), made))
    assert list(found) == names
    moment = cross = 0
    for batch in batches:
        stream, conditioning = model.embed(**batch)
        block = jax.tree.map(lambda a: a[0], model.stacks[0].block)
        stream = block(stream, conditioning)
        block = jax.tree.map(lambda a: a[1], model.stacks[0].block)
        table = block.scale_shift_table[...] + conditioning.modulation
        x = block.norm1(stream) * (1 + table[..., 1, :]) + table[..., 0, :]
        exact = fit.fit(weights[names[1]], *edges)(x).reshape(-1, width)
        factor = jnp.full((1, 1), 0.95 * 0.95)
        rounded = fake_quantize_dynamic(exact, TOKENS, (factor, factor))
        moment, cross = moment + rounded.T @ rounded, cross + rounded.T @ exact
    # The same float32 operations, fused differently: where an input lies on the border of two codes it may fall to the
    # other, which is a third of its range. Sums over 144 tokens.
    for one, expected in ((found[names[1]].moment, moment), (found[names[1]].cross, cross)):
        assert np.linalg.norm(one - expected) < 0.01 * np.linalg.norm(expected)
    with pytest.raises(UserError, match="empty"):
        dict(rounded_inputs(model, [], names, dict.fromkeys(names, scheme), made))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "inputs"), [(wan, wan_inputs), (cogvideox, cogvideox_inputs)])
def test_models_lose_less_at_few_bits_of_their_inputs(model, inputs):
    model, inputs = model(), inputs()
    run = jax.jit(lambda model: model(**inputs))
    exact = run(model)

    def error(**options):
        quantized = qvdjax.quantize(model, get("gptq-w4a4", rotation=True, **options), [inputs])
        return float(jnp.square(run(quantized) - exact).mean())

    assert error(rounded_inputs=True) < error()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "cogvideox", "hunyuanvideo"])
def test_our_own_recipe_is_an_ordinary_one(family):
    make, inputs = {
        "wan": (wan, wan_inputs), "cogvideox": (cogvideox, cogvideox_inputs),
        "hunyuanvideo": (lambda: hunyuanvideo(num_layers=1, num_single_layers=1), hunyuanvideo_inputs),
    }[family]  # fmt: skip
    model, batches = make(), [inputs(seed=seed) for seed in (1, 2)]
    run = jax.jit(lambda model: model(**batches[0]))
    exact = run(model)
    error = lambda found, wanted: float(jnp.square(found - wanted).sum() / jnp.square(wanted).sum())  # noqa: E731
    recipe = get("best-w4a4", epochs=3, batch=1)
    quantized = qvdjax.quantize(model, recipe, batches, execution="integer")
    assert error(run(quantized), exact) < error(
        run(qvdjax.quantize(model, get("flatquant-w4a4", epochs=3, batch=1), batches)), exact
    )
    simulated = set_execution(nnx.clone(quantized), "simulate")
    # Codes on the border of two, one in some thousand; at four bits each is a seventh of its range.
    assert error(run(simulated), run(quantized)) < 1e-3
    rows = [row["online"] for row in qvdjax.describe(quantized) if row["activation_bits"] == 4]
    assert rows
    assert all(row["center_bits"] == 8 for row in rows)
