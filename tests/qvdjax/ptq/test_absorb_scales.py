"""Scales of values put into weights: the same function before rounding, the same codes after it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import cogvideox, cogvideox_inputs, wan, wan_inputs

import qvdjax
from qvdjax.calibration.ranges import input_ranges
from qvdjax.ptq import FitChannelScale, absorb_scales
from qvdjax.recipes import decide, get

run = jax.jit(lambda model, inputs: model(**inputs))
NEAREST = {"learn": False, "weight_range": "minmax"}


@pytest.mark.parametrize(("make", "inputs"), [(wan, wan_inputs), (cogvideox, cogvideox_inputs)])
def test_the_function_is_kept(make, inputs):
    model, given = make(num_layers=2), inputs(batch=1)
    fit, ranges = FitChannelScale(0.5, absorb=True), input_ranges(model, [given])
    schemes = decide(model, get("ptq4dit-w4a4")).schemes
    absorbed, kept, changed = absorb_scales(model, schemes, ranges, fit)
    # Float32, through two blocks whose weights were scaled: sums of at most 96 terms each.
    chex.assert_trees_all_close(run(absorbed, given), run(model, given), rtol=1e-3, atol=1e-3)
    outputs = {name for name in schemes if name.endswith("to_out.0")}
    assert {name for name, scheme in kept.items() if scheme != schemes[name]} == outputs
    assert all(not kept[name].transforms and "values" in kept[name].reason for name in outputs)
    name = next(name for name in outputs if ".1.attn1" in name)
    layer, after = (m.stacks[-1].block.attn1.to_out["0"].weight[...][1] for m in (model, absorbed))
    low, high = ranges[name]
    scale = np.sqrt(np.maximum(-low, high).astype(np.float64) / np.abs(np.asarray(layer, np.float64)).max(axis=0))
    np.testing.assert_allclose(after, layer * scale, rtol=1e-5)
    # Both now have the size that the paper gives them.
    np.testing.assert_allclose(np.maximum(-changed[name][0], changed[name][1]), np.abs(after).max(axis=0), rtol=1e-5)
    seen = input_ranges(absorbed, [given])[name]
    np.testing.assert_allclose(seen[1], changed[name][1], rtol=1e-3, atol=1e-5)  # what the layer meets now


def test_nothing_is_lost_against_dividing_online():
    """Every output channel of the values has a range of its own: the codes are those of the layer as it was."""
    model, inputs = wan(num_layers=2), wan_inputs(batch=1)
    recipes = [get("ptq4dit-w4a8", absorb=absorb, **NEAREST) for absorb in (True, False)]
    absorbed, online = (qvdjax.quantize(model, recipe, [inputs], execution="simulate") for recipe in recipes)
    out = lambda m: m.stacks[0].block.attn1.to_out["0"]  # noqa: E731
    assert (out(absorbed).transform is None, out(online).transform is None) == (True, False)
    apart = out(absorbed).codes[...].astype(jnp.int8) != out(online).codes[...].astype(jnp.int8)
    assert float(apart.mean()) < 1e-3  # products in another order, at the edge between two codes
    row = {row["path"]: row for row in qvdjax.describe(absorbed)}["blocks.1.attn1.to_out.0"]
    assert row["online"] is None
    assert "divided by its scale by the weights that make values" in row["reason"]


def test_blocks_that_stay_float_keep_their_weights():
    model, inputs = wan(), wan_inputs()
    recipe = get("ptq4dit-w4a4", skip=r"blocks\.1\..*")
    absorbed, kept, _ = absorb_scales(
        model, decide(model, recipe).schemes, input_ranges(model, [inputs]), recipe.transform
    )
    before, after = (m.stacks[0].block.attn2.to_v.weight[...] for m in (model, absorbed))
    assert [bool((a == b).all()) for a, b in zip(before, after, strict=True)] == [False, True, False]
    assert not kept["blocks.1.attn2.to_out.0"].quantizes
