"""Models with learned quantizers: what they compute, how the timestep reaches layers, what is trained."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from qvdjax.errors import UserError
from qvdjax.nn import Conv, InputClip, LayerScheme, Param, at_timestep
from qvdjax.numerics import Quantizer
from qvdjax.parallel import make_mesh, shardings
from qvdjax.qat import (
    ClipLogit,
    LearnedLinear,
    LearnedScale,
    LearnedZeroPoint,
    deploy,
    fake_quantized,
    learned,
    with_adapters,
    with_gamma,
    with_low_rank,
    without_auxiliary,
)
from qvdjax.qat.learned_linear import learned_linear

run = jax.jit(lambda model, inputs: model(**inputs))
BINS = InputClip("bins", 4)


def moved(model):
    """As training might leave it: another clip in every row, side and layer; step sizes at which weights clip."""

    def move(variable):
        value = variable.get_value()
        if isinstance(variable, LearnedScale):
            return variable.replace(0.6 * value)
        if isinstance(variable, ClipLogit):
            return variable.replace(jnp.linspace(-1.0, 2.0, value.size).reshape(value.shape))
        return variable

    return jax.tree.map(move, model, is_leaf=lambda node: isinstance(node, nnx.Variable))


def test_the_minmax_start_computes_what_fake_quantization_computes(toy, inputs_of, schemes_of):
    schemes = {name: dataclasses.replace(one, input_clip=None) for name, one in schemes_of(symmetric=True).items()}
    trained = learned(toy, schemes, start="minmax")
    # The same float32 operations, compiled apart.
    chex.assert_trees_all_close(
        run(trained, inputs_of()), run(fake_quantized(toy, schemes), inputs_of()), rtol=1e-5, atol=1e-5
    )


def test_kinds_shapes_and_axes_of_what_is_trained(toy, schemes_of):
    layer = learned(toy, schemes_of(clip=BINS)).stacks[0].block.up
    found = {
        name: (type(variable), variable.get_value().shape, variable.get_metadata("axes"))
        for name, variable in vars(layer).items()
        if isinstance(variable, nnx.Variable)
    }
    assert found == {
        "weight": (Param, (2, 10, 6), ("mlp", "embed")),
        "bias": (Param, (2, 10), ("mlp",)),
        "weight_scale": (LearnedScale, (2, 10, 1), ("mlp", None)),
        "weight_zero_point": (LearnedZeroPoint, (2, 10, 1), ("mlp", None)),
        "clip_logits": (ClipLogit, (2, 4, 2), (None, None)),
    }
    assert all(issubclass(kind, nnx.Param) for kind, *_ in found.values())


def test_parameters_are_split_as_their_weights(toy, schemes_of):
    mesh = make_mesh({"tensor": 2})
    layer = shardings(learned(toy, schemes_of(clip=BINS)), mesh).stacks[0].block.up
    assert layer.weight_scale.get_value().spec == PartitionSpec(None, "tensor", None)
    assert layer.clip_logits.get_value().spec == PartitionSpec(None, None, None)


def test_each_sample_is_clipped_by_its_own_timestep(toy, inputs_of, schemes_of):
    model = moved(learned(toy, schemes_of(clip=BINS)))
    both = inputs_of()
    together = run(model, both)
    alone = [
        run(model, {name: a if a is None else a[i : i + 1] for name, a in both.items()}) for i in range(2)
    ]  # fmt: skip
    # The same operations on other batch sizes; no range spans samples.
    chex.assert_trees_all_close(together, jnp.concatenate(alone), rtol=1e-5, atol=1e-5)
    swapped = run(model, {**both, "timestep": both["timestep"][::-1]})
    assert float(jnp.abs(together - swapped).max()) > 1e-2  # and the clips do differ


def test_gradients_through_scan_and_remat_reach_every_parameter(toy, inputs_of, schemes_of):
    model = moved(learned(toy, schemes_of(clip=BINS)))

    def loss(model, remat):
        return jnp.square(model(**inputs_of(), remat=remat)).sum()

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(model, remat) for remat in (False, True))
    chex.assert_trees_all_close(jax.tree.leaves(plain), jax.tree.leaves(again), rtol=1e-4, atol=1e-4)
    for path, gradient in nnx.to_flat_state(nnx.state(plain)):
        assert bool(jnp.isfinite(gradient[...]).all()), path
        assert bool((gradient[...] != 0).any()), path
    used = np.asarray(plain.stacks[0].block.up.clip_logits[...] != 0).any(axis=-1)  # [layers, rows]
    assert used.tolist() == [[True, False, False, True]] * 2  # timesteps 110 and 910 of four bins


def test_nothing_of_a_call_stays_in_the_model(toy, inputs_of, schemes_of):
    model = learned(toy, schemes_of(clip=BINS))
    before = jax.tree.structure(model)
    inputs = inputs_of()
    bound = at_timestep(model, inputs["timestep"])
    assert bound.stacks[0].block.up.timestep[...].shape == (2, 2)  # a copy a layer, which scan takes apart
    assert jax.tree.structure(model) == before
    with pytest.raises(UserError, match="timestep"):
        model.stacks[0](jnp.zeros((2, 4, 6)), None)
    assert at_timestep(toy, inputs["timestep"]) is toy


def test_timesteps_a_token_count_by_their_largest(toy, schemes_of):
    model = learned(toy, schemes_of(clip=BINS))
    bound = at_timestep(model, jnp.array([[0.0, 700.0], [0.0, 0.0]]))
    assert bound.stacks[0].block.up.timestep[0].tolist() == [700.0, 0.0]


def test_gradient_scale_is_an_option(toy, inputs_of, schemes_of):
    def gradients(scaled):
        layer = learned(toy, schemes_of(), scaled_gradients=scaled).proj_out
        return jax.grad(lambda layer: layer(inputs_of()["latents"]).sum())(layer)

    scaled, plain = gradients(True), gradients(False)
    for name in ("weight_scale", "weight_zero_point"):
        wanted = getattr(plain, name)[...] / np.sqrt(6 * 15)
        chex.assert_trees_all_close(getattr(scaled, name)[...], wanted, rtol=1e-5)  # one more multiplication
    chex.assert_trees_all_equal(scaled.clip_logits[...], plain.clip_logits[...])


def test_low_rank_modules_start_by_undoing_the_rounding(toy, inputs_of, schemes_of):
    """At full rank W_q + L R is W: the layer is the float one on rounded inputs (QVGen section 4)."""
    model = learned(toy, schemes_of(bits=3))
    helped = with_low_rank(model, rank=6)
    layer, source = with_gamma(helped, jnp.ones(6)).proj_out, toy.proj_out
    x = inputs_of()["latents"]
    # An SVD of a 6 x 6 matrix in float32, multiplied out again.
    chex.assert_trees_all_close(layer(x), source(layer.rounded_input(x)), atol=1e-4)
    with pytest.raises(UserError, match="gamma"):
        helped(**inputs_of())
    faded = with_gamma(helped, jnp.zeros(6))
    chex.assert_trees_all_equal(run(faded, inputs_of()), run(model, inputs_of()))
    with pytest.raises(UserError, match="auxiliary"):
        deploy(faded)
    bare = without_auxiliary(helped)
    chex.assert_trees_all_equal(run(bare, inputs_of()), run(model, inputs_of()))
    assert deploy(bare).recipe_name == ""


def test_an_adapter_is_rounded_with_its_weight(toy, inputs_of, schemes_of):
    """Q(W + B A), by hand: the layer whose weight is W + B A, on the same grid."""
    model = learned(toy, schemes_of(bits=4))
    helped = with_adapters(model, rank=2)
    chex.assert_trees_all_equal(run(helped, inputs_of()), run(model, inputs_of()))  # B begins at zero
    layer, plain = helped.proj_out, nnx.clone(model.proj_out)
    chex.assert_trees_all_close(layer.adapter.size[0, 0], plain.weight_scale[...].mean(), rtol=1e-6)
    entries = layer.adapter.right[...] * layer.adapter.size[...]
    assert 0.3 < float(jnp.abs(entries).max()) * np.sqrt(6) <= 1 + 1e-6  # uniform within 1 / sqrt(in)
    layer.adapter.left[...] = jax.random.normal(jax.random.key(3), layer.adapter.left.shape)
    size = layer.adapter.size[...]
    product = (size * layer.adapter.left[...]) @ (size * layer.adapter.right[...])
    plain.weight[...] = plain.weight[...] + product
    assert float(jnp.abs(product).max()) > 0.1 * float(size[0, 0])
    x = inputs_of()["latents"]
    chex.assert_trees_all_equal(layer(x), plain(x))
    model = nnx.clone(model)
    model.proj_out = plain
    chex.assert_trees_all_equal(deploy(helped).proj_out.codes[...], deploy(model).proj_out.codes[...])
    with pytest.raises(UserError, match="rank 0"):
        with_adapters(model, rank=0)


def test_float_inputs_and_float_weights_stay_float(toy, inputs_of):
    x, source = inputs_of()["latents"], toy.proj_out
    only_weight = learned_linear(source, LayerScheme(Quantizer(4)))
    chex.assert_trees_all_equal(only_weight.rounded_input(x), x)
    only_input = learned_linear(source, LayerScheme(None, Quantizer(4, granularity="token", dynamic=True)))
    chex.assert_trees_all_equal(only_input.rounded_weight(), source.weight[...])
    assert only_input.weight_scale is None
    assert isinstance(only_input, LearnedLinear)


def test_what_cannot_be_learned_is_refused(toy, schemes_of):
    static = LayerScheme(Quantizer(8), Quantizer(8, granularity="tensor"))
    with pytest.raises(UserError, match="calibration"):
        learned(toy, {**schemes_of(), "proj_out": static})
    smoothed = LayerScheme(Quantizer(8), transforms=("smooth_scale",))
    with pytest.raises(UserError, match="calibration"):
        learned(toy, {**schemes_of(), "proj_out": smoothed})
    with pytest.raises(UserError, match="does not divide"):
        learned_linear(toy.proj_out, LayerScheme(Quantizer(4, granularity="group", group_size=4)))


def test_abstract_models_need_no_memory(toy, schemes_of):
    layer = jax.eval_shape(lambda: learned(toy, schemes_of(clip=BINS))).stacks[0].block.down
    assert layer.weight_scale.get_value().shape == (2, 6, 1)


def test_convolutions_are_refused(toy, schemes_of):
    model = nnx.clone(toy)
    model.proj_out = Conv(6, 6, (2, 2), role="convolution", axes=(None, None), key=jax.random.key(0))
    with pytest.raises(UserError, match="proj_out"):
        learned(model, schemes_of())
