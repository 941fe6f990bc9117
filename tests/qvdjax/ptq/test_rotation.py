"""Rotated inputs: the function is kept, heavy channels are spread, and what is absorbed costs nothing."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import cogvideox, cogvideox_inputs, wan, wan_inputs, wan_with_heavy_text

import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import InputTransform, LayerScheme, Linear, Rotation
from qvdjax.numerics import Quantizer
from qvdjax.parallel import make_mesh, place
from qvdjax.ptq import FitRotation, absorb_rotations, quantize_layer, set_execution
from qvdjax.recipes import decide, get

run = jax.jit(lambda model, inputs: model(**inputs))
TOKENS = Quantizer(8, granularity="token", dynamic=True)
ROTATED = {"transforms": ("rotation",), "rotation": Rotation()}


def relative_error(candidate, reference) -> float:
    return float(jnp.square(candidate - reference).sum() / jnp.square(reference).sum())


def linear(width, out=7):
    return Linear(width, out, role="query", axes=("heads", "embed"), key=jax.random.key(0))


@hypothesis.given(width=st.integers(1, 90), block=st.none() | st.integers(2, 40), signs=st.booleans(),
                  scaled=st.booleans())  # fmt: skip
@hypothesis.settings(max_examples=10)
def test_transformed_inputs_times_the_transformed_weight_are_the_product(width, block, signs, scaled):
    random = np.random.default_rng(width)
    x, weight = (random.standard_normal((*shape, width)).astype(np.float32) for shape in ((3, 2), (5,)))
    transform = InputTransform(
        smooth_scale=jnp.asarray(random.uniform(0.3, 3, width), jnp.float32) if scaled else None,
        signs=jnp.asarray(random.choice([-1.0, 1.0], width), jnp.float32) if signs else None,
        rotation=Rotation(block, signs),
    )  # fmt: skip
    product = transform(x) @ transform.on_weight(weight).T
    chex.assert_trees_all_close(product, x @ weight.T, atol=1e-4)  # float32 sums of at most 90 terms near 1
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), transform)
    chex.assert_trees_all_close(stacked.on_weight(np.stack([weight, weight]))[1], transform.on_weight(weight))


def test_a_heavy_channel_is_spread_over_all():
    x = jax.random.normal(jax.random.key(1), (64, 96)).at[:, 17].mul(50.0)
    transform = FitRotation().fit(jnp.zeros((1, 96)), None, None)
    peak = lambda a: float(jnp.abs(a).max() / jnp.sqrt(jnp.square(a).mean()))  # noqa: E731
    assert peak(x) > 9
    assert peak(transform(x)) < 4  # one channel of size h becomes 96 of size h / sqrt(96)
    layer, choice = linear(96), LayerScheme(Quantizer(8), TOKENS)
    plain = quantize_layer(layer, choice, execution="integer")
    rotated = quantize_layer(layer, LayerScheme(Quantizer(8), TOKENS, **ROTATED), execution="integer",
                             fit=FitRotation())  # fmt: skip
    assert relative_error(rotated(x), layer(x)) < 0.5 * relative_error(plain(x), layer(x))


@pytest.mark.parametrize(("make", "inputs"), [(wan, wan_inputs), (cogvideox, cogvideox_inputs)])
def test_absorbed_rotations_keep_the_function(make, inputs):
    model, given = make(), inputs()
    fit = FitRotation()
    schemes = decide(model, get("quarot-w4a4")).schemes
    absorbed, kept = absorb_rotations(model, schemes, fit)
    # Float32, through three blocks whose weights were rotated: sums of at most 96 terms each.
    chex.assert_trees_all_close(run(absorbed, given), run(model, given), rtol=1e-3, atol=1e-3)
    changed = {name for name, scheme in kept.items() if scheme != schemes[name]}
    assert changed == {name for name in schemes if name.endswith("to_out.0")}
    assert all(not kept[name].transforms and "rotated" in kept[name].reason for name in changed)
    before, after = (m.stacks[-1].block.attn1.to_v.weight[...] for m in (model, absorbed))
    assert (jnp.abs(before - after) > 1e-3).mean() > 0.9


def test_blocks_that_stay_float_keep_their_weights():
    model = wan()
    recipe = get("quarot-w4a4", skip=r"blocks\.1\..*")
    absorbed, kept = absorb_rotations(model, decide(model, recipe).schemes, recipe.transform)
    same = [
        bool((a == b).all())
        for a, b in zip(absorbed.stacks[0].block.attn2.to_v.weight[...], model.stacks[0].block.attn2.to_v.weight[...])
    ]
    assert same == [False, True, False]
    assert not kept["blocks.1.attn2.to_out.0"].quantizes


def test_a_rotated_model_beats_rounding_where_channels_are_heavy():
    """Heavy features between value and output, and of the text: rotations spread them without any calibration."""
    model, inputs = wan_with_heavy_text(), wan_inputs()
    exact = run(model, inputs)
    error = lambda name: relative_error(run(qvdjax.quantize(model, name), inputs), exact)  # noqa: E731
    assert error("quarot-w8a4") < 0.7 * error("rtn-w8a4")


def test_integer_and_simulated_execution_agree():
    quantized = qvdjax.quantize(wan(), get("quarot-w8a8", absorb=True), execution="integer")
    simulated = set_execution(nnx.clone(quantized), "simulate")
    # Flipped codes: below (2**-8)**2, as without rotation.
    assert relative_error(run(simulated, wan_inputs()), run(quantized, wan_inputs())) < 1e-5


def test_a_sharded_layer_gives_the_same():
    """Split along the very channels that the rotation mixes."""
    layer = Linear(96, 16, role="feed_forward_out", axes=("embed", "mlp"), key=jax.random.key(0))
    scheme = LayerScheme(Quantizer(8), TOKENS, **ROTATED)
    quantized = quantize_layer(layer, scheme, execution="integer", fit=FitRotation())
    x = jax.random.normal(jax.random.key(1), (2, 4, 96))
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    sharded = place(quantized, mesh)
    assert not sharded.codes[...].sharding.is_fully_replicated
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", None, "tensor")))
    # Float32 sums in another order may flip one code of 96: a 250th of an input, of 96 in a sum.
    chex.assert_trees_all_close(jax.jit(lambda m, x: m(x))(sharded, split), quantized(x), atol=0.01)


def test_the_description_says_what_is_online():
    rows = {row["path"]: row for row in qvdjax.describe(qvdjax.quantize(wan(), "quarot-w4a4"))}
    row = rows["blocks.1.ffn.net.2"]
    assert row["online"] == {
        "transforms": ["rotation"], "rotation_block": 96, "center_bits": None, "rank": None, "branch_bytes": 0,
        "multiply_adds": 96 * (3 * 4 + 8), "share": 20 / 64,
    }  # fmt: skip
    assert row["bytes"] == 64 * 96 // 2 + 64 * 4 + 64 * 4 + 96 * 4  # codes, scales, bias, signs
    assert rows["blocks.1.attn1.to_out.0"]["online"]["rotation_block"] == 64
    assert rows["proj_out"]["online"] is None


def test_large_models_are_rotated_without_memory():
    config = {"_class_name": "WanTransformer3DModel"}  # 14 billion parameters
    quantized = jax.eval_shape(lambda: qvdjax.quantize(models.build(config, dtype=jnp.bfloat16), "quarot-w4a8"))
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    # 5120 = 40 * 128 and 13824 = 108 * 128 channels, as a share of the products' 5120 and of another 5120 outputs.
    assert rows["blocks.7.attn1.to_q"]["online"]["share"] == 168 / 5120
    assert rows["blocks.7.ffn.net.2"]["online"]["share"] == 236 / 5120
    assert rows["blocks.7.attn1.to_out.0"]["online"]["rotation_block"] == 5120
    absorbed = jax.eval_shape(
        lambda: qvdjax.quantize(models.build(config, dtype=jnp.bfloat16), get("quarot-w4a8", absorb=True))
    )
    rows = {row["path"]: row for row in qvdjax.describe(absorbed)}
    assert rows["blocks.7.attn1.to_out.0"]["online"] is None
    assert rows["blocks.7.attn1.to_q"]["online"]["rotation_block"] == 5120


def test_options_of_the_recipe():
    plain = decide(wan(), get("quarot-w4a4", signs="false", block="16")).schemes["blocks.0.attn1.to_q"]
    assert plain.rotation == Rotation(16, signs=False)
    assert not get("quarot-w4a4").needs_calibration
    assert (get("quarot-w4a4").transform.absorb, get("quarot-w4a4", absorb="true").transform.absorb) == (False, True)
    online = qvdjax.quantize(wan(), get("quarot-w4a4", signs="false"))
    assert online.stacks[0].block.attn1.to_out["0"].transform.signs is None
    with pytest.raises(UserError, match="at least 2"):
        get("quarot-w4a4", block="1")


def test_what_is_refused():
    static = LayerScheme(Quantizer(8), Quantizer(8, granularity="tensor"), **ROTATED)
    with pytest.raises(UserError, match="rotated input"):
        quantize_layer(linear(8), static, execution="integer", fit=FitRotation())
    with pytest.raises(ValueError, match="order"):
        LayerScheme(Quantizer(8), TOKENS, ("rotation", "smooth_scale"), rotation=Rotation())
    with pytest.raises(ValueError, match="belong together"):
        LayerScheme(Quantizer(8), TOKENS, ("rotation",))


def test_groups_of_channels_have_ranges_of_their_own():
    """DVD-Quant's blocks, Q-DiT's groups: integers as simulated, weights nearer, wrong sizes refused."""
    model, inputs = wan(), wan_inputs()
    grouped = get("dvd-quant-w4a4", activation_group_size=16)
    quantized = qvdjax.quantize(model, grouped, execution="integer")
    simulated = set_execution(nnx.clone(quantized), "simulate")
    assert relative_error(run(simulated, inputs), run(quantized, inputs)) < 1e-4  # a flipped code of a thousand
    nearer, plain = (
        {row["path"]: row["sqnr_db"] for row in qvdjax.describe(one) if row["activation_bits"] == 4}
        for one in (quantized, qvdjax.quantize(model, "quarot-w4a4"))
    )
    assert all(nearer[path] > plain[path] + 1 for path in plain)  # decibels, by a zero point and refinement
    with pytest.raises(UserError, match="activation_group_size 48 does not divide a width of 64"):
        qvdjax.quantize(model, get("dvd-quant-w4a4", activation_group_size=48))
    with pytest.raises(UserError, match="group_size 32 and activation_group_size 16 differ"):
        qvdjax.quantize(model, get("rtn-w4a4", group_size=32, activation_group_size=16))
