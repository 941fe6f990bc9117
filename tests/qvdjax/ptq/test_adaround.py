"""AdaRound: nothing is rounded at first, everything in the end, always to a neighbour, and for a smaller error."""

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
from qvdjax.errors import UserError
from qvdjax.nn import InputTransform, LayerScheme, Linear, VideoModel, layers_of
from qvdjax.nn.linear import QuantizedLinear
from qvdjax.nn.variables import at, shape_of
from qvdjax.numerics import Quantizer, encode
from qvdjax.ptq import reconstruct
from qvdjax.ptq.reconstruction import AdaptiveRounding, FinishedBlocks, Reconstruction
from qvdjax.ptq.reconstruction.adaptive_rounding import (
    AdaptivelyRoundedWeight,
    hardened,
    logits_of,
    rectified_sigmoid,
)
from qvdjax.ptq.reconstruction.examples import Examples
from qvdjax.ptq.reconstruction.known import Known
from qvdjax.ptq.reconstruction.training import prepared, relative_error, start, train
from qvdjax.recipes import decide, get

AXES = ("heads", "embed")
QUANTIZERS = st.builds(
    lambda bits, symmetric, group, method: Quantizer(
        bits, symmetric, "group" if group else "channel", group, range_method=method
    ),
    st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([None, 4]), st.sampled_from(["minmax", "search"]),
)  # fmt: skip


def weights(seed: int, transform: InputTransform | None = None, quantizer: Quantizer = Quantizer(4)):
    weight = jnp.asarray(np.random.default_rng(seed).standard_normal((5, 12)), jnp.float32)
    return weight, AdaptivelyRoundedWeight(weight, LayerScheme(quantizer), transform, AXES)


def rounded(operands: AdaptivelyRoundedWeight, weight: jax.Array) -> jax.Array:
    return operands(jnp.zeros(weight.shape[-1]), weight)[1]


@hypothesis.given(quantizer=QUANTIZERS, seed=st.integers(0, 99))
@hypothesis.settings(max_examples=6, deadline=None)
def test_it_starts_at_the_float_weight(quantizer, seed):
    weight, operands = weights(seed, quantizer=quantizer)
    scale, zero_point = quantizer.scale_of(weight)
    spread = lambda a: np.repeat(np.asarray(a), 12 // a.shape[-1], axis=-1)  # noqa: E731
    zero = 0 if zero_point is None else spread(zero_point)
    grid = quantizer.grid
    inside = np.clip(weight, (grid.low - zero) * spread(scale), (grid.high - zero) * spread(scale))
    # Float32 through a logarithm and a sigmoid: an error of some 1e-6 of a step, and of codes of up to 128 steps.
    chex.assert_trees_all_close(rounded(operands, weight), inside, atol=3e-5 * float(scale.max()))


@hypothesis.given(quantizer=QUANTIZERS, seed=st.integers(0, 99))
@hypothesis.settings(max_examples=6, deadline=None)
def test_codes_never_leave_the_two_neighbours(quantizer, seed):
    weight, operands = weights(seed, quantizer=quantizer)
    nearest = encode(weight, quantizer.grid, *quantizer.scale_of(weight))
    chex.assert_trees_all_equal(operands.learned()["weight"].scale, nearest.scale)
    place = np.asarray(weight) / np.repeat(nearest.scale, 12 // nearest.scale.shape[-1], axis=-1)
    if nearest.zero_point is not None:
        place = place + np.repeat(nearest.zero_point, 12 // nearest.scale.shape[-1], axis=-1)
    low, high = (np.clip(f(place), quantizer.grid.low, quantizer.grid.high) for f in (np.floor, np.ceil))
    started = np.asarray(operands.learned()["weight"].codes, np.float32)
    # Undecided halves may go either way; nothing else differs from the nearest code.
    apart = started != np.asarray(nearest.codes, np.float32)
    assert (np.abs(np.abs(place - np.floor(place)) - 0.5)[apart] < 1e-4).all()
    for spread in (1.0, 100.0):
        logits = spread * np.random.default_rng(seed + 1).standard_normal(weight.shape)
        operands.logits[...] = jnp.asarray(logits, jnp.float32)
        codes = np.asarray(operands.learned()["weight"].codes, np.float32)
        whole = np.isclose(place, np.round(place), atol=1e-4)  # floor and ceil of one that is a code up to its last bit
        assert ((codes == low) | (codes == high) | (whole & (np.abs(codes - np.round(place)) <= 1))).all()


def test_the_rectified_sigmoid_and_its_inverse():
    share = jnp.linspace(0, 1, 11)
    # Float32 at slopes of at most 1 / 0.09.
    chex.assert_trees_all_close(rectified_sigmoid(logits_of(share)), share, atol=1e-6)
    assert float(rectified_sigmoid(jnp.array(0.0))) == 0.5
    # 1.2 / (1 + e^-3) - 0.1 is above 1: reached, and flat from there on.
    assert float(rectified_sigmoid(jnp.array(3.0))) == 1.0
    assert float(jax.grad(rectified_sigmoid)(3.0)) == 0.0


def test_the_penalty_is_the_published_one():
    weight, operands = weights(0)
    block = nnx.List([operands, weights(1)[1]])
    plan = AdaptiveRounding(penalty=0.3, warm_up=0.2, beta_start=20, beta_end=2)
    shares = np.concatenate([np.asarray(one.share(), np.float64) for one in block])
    assert float(plan.penalty_of(block, jnp.array(0.19))) == 0.0
    for progress, beta in ((0.2, 20), (0.6, 11), (1.0, 2)):
        wanted = 0.3 * (1 - np.abs(2 * shares - 1) ** beta).sum()
        # A float32 sum of 120 terms of at most 1, powers of up to 20.
        assert float(plan.penalty_of(block, jnp.array(progress))) == pytest.approx(wanted, rel=1e-4)
    assert float(plan.penalty_of(hardened(block), jnp.array(1.0))) == 0.0


class Source(VideoModel):
    """A model without blocks whose stream is its latents."""

    def embed(self, latents):
        return latents, None


class OneLayer(nnx.Module):
    """A block that adds what one layer gives."""

    def __init__(self, out: int, width: int):
        self.layer = Linear(width, out, role="query", axes=AXES, key=jax.random.key(1), bias=False)

    def __call__(self, x, conditioning):
        return x + self.layer(x)


@pytest.mark.parametrize("transform", [False, True])
def test_correlated_inputs_are_rounded_for_a_smaller_error(transform):
    """Three bits, inputs that vary along few directions: errors can cancel, and nearest rounding does not see it."""
    width, keys = 16, jax.random.split(jax.random.key(0), 2)
    mix = jax.random.normal(keys[0], (width, width)) * jnp.exp(-0.4 * jnp.arange(width))
    x = jnp.matmul(jax.random.normal(keys[1], (4, 1, 64, width)), mix.T)
    block, outer = OneLayer(width, width), Source()
    target = jax.jit(jax.vmap(lambda one: block(one, None)))(x)
    examples = Examples({"latents": x}, (x,), (target,), (jnp.ones(x.shape[:3]),))
    # With three bits and sixteen channels a weight has some hundred times the share of the error that it has in a real
    # layer: it takes more to make it decide.
    rounding = AdaptiveRounding(penalty=0.5, rate=0.03)
    plan = Reconstruction(rounding=rounding, unit="change", selection=None, token_weights=None)
    scheme = LayerScheme(Quantizer(3), None, ("smooth_scale",) if transform else ())
    scale = InputTransform(smooth_scale=jnp.linspace(0.5, 2, width) if transform else jnp.ones(width))

    class Fit:
        def fit(self, weight, low, high):
            return scale

    known = {"layer": Known(ranges=(jnp.zeros(width), jnp.zeros(width)))}
    student = prepared(block, {"layer": scheme}, Fit(), known, plan)
    weight = scale.on_weight(block.layer.weight[...])
    nearest = encode(weight, scheme.weight.grid, *scheme.weight.scale_of(weight)).dequantize()
    miss = jnp.matmul(scale(x), nearest.T) - (target - x)
    error, change = relative_error(hardened(student), outer, examples)
    # The sum over four examples of float32 means.
    chex.assert_trees_all_close(error, jnp.square(miss).mean(axis=(1, 2, 3)).sum(), rtol=1e-3)
    soft, _ = relative_error(student, outer, examples)
    assert float(soft) < 1e-6 * float(change)  # the float weight: nothing is rounded before training

    steps = 1200
    state = start(student, plan=plan, steps=steps)
    for _ in range(steps // 4):
        state = train(state, student, outer, examples, change / 4, plan=plan, steps=steps)
    nnx.update(student, state[0])
    assert int(state[2]) == steps
    share = student.layer.operands.share()
    # A released run ends the same way: all but a few of 256 are decided, and deciding those changes little.
    assert float(((share > 0.01) & (share < 0.99)).mean()) < 0.02
    soft, hard = (float(relative_error(one, outer, examples)[0]) for one in (student, hardened(student)))
    assert abs(hard - soft) < 0.1 * soft
    assert hard < 0.6 * float(error)
    found = student.layer.operands.learned()
    chex.assert_trees_all_close(
        jnp.matmul(scale(x), found["weight"].dequantize().T) - (target - x),
        jax.jit(jax.vmap(lambda one: hardened(student)(one, None)))(x) - target, atol=1e-5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return wan(num_layers=2), [wan_inputs(batch=1, seed=seed) for seed in (1, 2)]


OPTIONS = {"iterations": 60, "rate": 0.05}


def test_one_program_serves_all_blocks_and_a_killed_run_goes_on(small, tmp_path):
    model, batches = small
    recipe = get("adaround-w3a8", **OPTIONS)
    arguments = (model, decide(model, recipe).schemes, batches, recipe.reconstruction)
    before = train._cache_size()
    whole = reconstruct(*arguments)
    assert train._cache_size() == before + 1
    assert all(0 < report.after < report.before for report in whole.blocks), whole.blocks
    finished = FinishedBlocks.open(tmp_path / "blocks", {"model": "wan"})

    def killed(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(*arguments, finished=finished, progress=killed)
    assert [report.name for report in finished.reports()] == ["blocks.0"]
    again = reconstruct(*arguments, finished=finished)
    # The first block's codes follow from what was read back, the second's from inputs that came through them.
    chex.assert_trees_all_equal(again.layers, whole.layers)
    assert train._cache_size() == before + 1


def test_what_is_deployed_is_an_ordinary_quantized_model(small):
    model, batches = small
    quantized = qvdjax.quantize(model, get("adaround-w3a8", **OPTIONS), batches, execution="simulate")
    nearest = qvdjax.quantize(model, get("rtn-w3a8", weight_range="search"), execution="simulate")
    assert jax.tree.structure(quantized) != jax.tree.structure(model)
    shapes = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(quantized) == shapes(nearest)  # nothing is left of what was trained
    other = 0
    for names, path, layer in layers_of(quantized, (QuantizedLinear,)):
        twin = at(nearest, path)
        chex.assert_trees_all_equal(layer.weight_scale[...], twin.weight_scale[...])
        apart = jnp.abs(layer.codes[...].astype(jnp.int8) - twin.codes[...].astype(jnp.int8))
        assert int(apart.max()) <= 1, names
        inside = path[0] == "stacks"
        assert bool(apart.any()) == inside, names  # layers outside the blocks are rounded to nearest
        other += int(apart.sum()) if inside else 0
        assert shape_of(layer.codes) == shape_of(twin.codes)
    assert other > 100
    run = jax.jit(lambda model, inputs: model(**inputs))
    exact = [run(model, inputs) for inputs in batches]
    error = lambda one: sum(float(jnp.square(run(one, b) - e).sum()) for b, e in zip(batches, exact))  # noqa: E731
    assert error(quantized) < error(nearest)


@pytest.mark.parametrize(("options", "message"), [
    ({"codebook": "gaussian"}, "leave codebook out"),
    ({"warm_up": "1"}, "share of the steps"),
    ({"beta_end": "30"}, "has to fall"),
    ({"penalty": "-1"}, "not positive"),
    ({"iterations": "0"}, "at least 1"),
    ({"p": "0.5"}, "power of at least 1"),
    ({"inputs": "mixed"}, "inputs are full_precision or propagated"),
])  # fmt: skip
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        get("adaround-w4a8", **options)
