"""Deployed models compute what was trained, in either execution, and survive being saved."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import wan

import models
import qvdjax
from qvdjax.diffusion import get_solver, sample
from qvdjax.nn import Codes, InputClip, LayerScheme, QuantizedLinear
from qvdjax.numerics import Quantizer
from qvdjax.ptq import apply_schemes, set_execution
from qvdjax.qat import ClipLogit, LearnedScale, LearnedZeroPoint, deploy, learned
from qvdjax.recipes import Recipe, Rule, decide

run = jax.jit(lambda model, inputs: model(**inputs))
CLIPS = {"none": None, "one": InputClip(), "bins": InputClip("bins", 4), "residue": InputClip("residue", 7)}


def trained(model, seed=0):
    """Quantizers moved about at random, as an optimizer would: fractional zero points, also beyond the codes."""
    random = np.random.default_rng(seed)

    def move(variable):
        value = variable.get_value()
        noise = random.standard_normal(value.shape).astype(np.float32)
        if isinstance(variable, LearnedScale):
            return variable.replace(value * np.exp(0.2 * noise))
        if isinstance(variable, LearnedZeroPoint):
            return variable.replace(value + 0.7 * noise)
        return variable.replace(value + noise) if isinstance(variable, ClipLogit) else variable

    return jax.tree.map(move, model, is_leaf=lambda node: isinstance(node, nnx.Variable))


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_deployed_models_compute_what_was_trained(toy, inputs_of, schemes_of, symmetric, clip):
    student = trained(learned(toy, schemes_of(symmetric, clip)))
    wanted = run(student, inputs_of())
    simulated = deploy(student, execution="simulate")
    # The same codes and float32 scales; products are summed in another order.
    chex.assert_trees_all_close(run(simulated, inputs_of()), wanted, rtol=1e-5, atol=1e-5)
    integer = set_execution(simulated, "integer")
    chex.assert_trees_all_close(run(integer, inputs_of()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_codes_are_the_learned_integers(toy, schemes_of, bits):
    student = trained(learned(toy, schemes_of(bits=bits)))
    deployed = deploy(student)
    for name in ("up", "down"):
        before, after = (getattr(model.stacks[0].block, name) for model in (student, deployed))
        w, s, z = (np.asarray(a[...]) for a in (before.weight, before.weight_scale, before.weight_zero_point))
        codes = np.clip(np.round(w / s + z), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        chex.assert_trees_all_equal(np.asarray(after.codes[...].astype(jnp.int8)), codes.astype(np.int8))
        chex.assert_trees_all_equal(np.asarray(after.weight_zero_point[...]), z)
        assert (z != np.round(z)).all()


def test_a_step_size_below_zero_is_deployed_as_it_was_trained(toy, inputs_of, schemes_of):
    student = learned(toy, schemes_of())
    student = nnx.clone(student)
    student.proj_out.weight_scale[...] = student.proj_out.weight_scale[...].at[0].set(-1.0)
    deployed = deploy(student, execution="simulate")
    assert (deployed.proj_out.weight_scale[...] > 0).all()
    chex.assert_trees_all_close(run(deployed, inputs_of()), run(student, inputs_of()), rtol=1e-5, atol=1e-5)


def test_the_trained_model_is_left_as_it_is(toy, schemes_of):
    student = learned(toy, schemes_of())
    before = jax.tree.structure(student)
    deployed = deploy(student, recipe_name="learned-w4a4")
    assert jax.tree.structure(student) == before
    assert isinstance(deployed.proj_out, QuantizedLinear)
    assert (deployed.recipe_name, student.recipe_name) == ("learned-w4a4", "")


def test_sampling_takes_each_steps_row(toy, inputs_of, schemes_of):
    """The jitted scan over steps against steps by hand: timesteps 1000 and 500, in two bins."""
    deployed = deploy(trained(learned(toy, schemes_of(clip=InputClip("bins", 4)))), execution="simulate")
    latents, context = inputs_of()["latents"], jnp.zeros((2, 1, 1))
    sampled = sample(deployed, context, noise=latents, solver=get_solver("euler"), steps=2).latents
    for timestep in (1000.0, 500.0):
        inputs = {"latents": latents, "timestep": jnp.full((2,), timestep), "context": context}
        latents = latents - 0.5 * run(deployed, inputs)
    chex.assert_trees_all_close(sampled, latents, rtol=1e-4, atol=1e-4)  # the same operations, compiled apart


def feed_forward_schemes(model, clip):
    """Learned quantizers in the feed-forward parts, float elsewhere."""
    activation = Quantizer(4, False, "token", dynamic=True)
    scheme = LayerScheme(Quantizer(4, False), activation, reason="a test", input_clip=clip)
    rules = (Rule(scheme, roles=("feed_forward_in", "feed_forward_out")),)
    return decide(model, Recipe("learned-w4a4", rules)).schemes


@pytest.mark.parametrize("clip", [InputClip(), InputClip("bins", 4)], ids=["one", "bins"])
def test_saved_and_loaded_bit_for_bit(tmp_path, clip):
    model = wan(num_layers=2, dtype=jnp.bfloat16)
    student = trained(learned(model, feed_forward_schemes(model, clip)))
    deployed = deploy(student, recipe_name="learned-w4a4")
    models.save(deployed, tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(deployed)
    for (path, saved), (_, read) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (deployed, loaded)), strict=True):
        assert saved.get_value().dtype == read.get_value().dtype, path
        assert (np.asarray(saved[...]) == np.asarray(read[...])).all(), path
    layer = loaded.stacks[0].block.ffn.net["2"]
    assert layer.input_clip[...].shape == (2, clip.count, 2)
    assert layer.scheme.input_clip == clip
    assert (layer.weight_zero_point[...] != jnp.round(layer.weight_zero_point[...])).any()
    assert qvdjax.describe(loaded) == qvdjax.describe(deployed)


def test_without_training_a_clip_has_its_start(toy, schemes_of):
    """Quantizing after training by a scheme that clips."""
    quantized = apply_schemes(toy, schemes_of(clip=InputClip("bins", 4)), execution="integer")
    clip = quantized.stacks[0].block.up.input_clip[...]
    chex.assert_trees_all_close(clip, jnp.full((2, 4, 2), 0.9025), rtol=1e-6)
    assert len(jax.tree.leaves(nnx.state(quantized, Codes))) == 3


def test_weights_alone(toy, inputs_of, schemes_of):
    schemes = {name: dataclasses.replace(one, activation=None, input_clip=None) for name, one in schemes_of().items()}
    student = trained(learned(toy, schemes))
    # Float products of the same weights.
    chex.assert_trees_all_close(run(deploy(student), inputs_of()), run(student, inputs_of()), rtol=1e-5, atol=1e-5)
