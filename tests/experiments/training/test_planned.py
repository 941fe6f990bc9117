"""The planned training step: described arguments are those of a real training, and the step compiles."""

import jax
import jax.numpy as jnp
import pytest

import models
from experiments.training.planned import STEPS, planned_step
from experiments.training.plans import averaged, following, group_rates
from experiments.training.settings import Settings
from experiments.training.student import student_of
from experiments.training.teacher import frozen
from experiments.training.trainer import Trainer
from qvdjax import recipes
from qvdjax.errors import UserError
from qvdjax.parallel import make_mesh, place, shard_batch

CONFIG = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
    "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32,
    "num_layers": 2,
}  # fmt: skip


def placed(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


@pytest.fixture
def mesh():
    return make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])


@pytest.fixture
def data(mesh):
    arrays = {"latents": jnp.zeros((4, 3, 4, 6, 4)), "context": jnp.zeros((4, 5, 8))}
    return shard_batch(arrays, mesh)


@pytest.mark.parametrize("name", ["qvgen-w4a4", "efficientdm-w4a4"])
def test_the_described_state_is_the_one_training_starts_from(name, mesh, data):
    recipe = recipes.get(name, rank=4)
    planned = planned_step(CONFIG, recipe, mesh, data)
    plan, model = recipe.training, place(models.build(CONFIG), mesh)
    settings = Settings(
        batch=4, average=averaged(plan, 0.9), objective=following(plan), group_rates=group_rates(plan)
    )  # fmt: skip
    trainer = Trainer(model, settings, teacher=model, student=student_of(model, recipe, STEPS), mesh=mesh)
    state, _, rest, teacher = planned.arguments
    assert placed(state) == placed(trainer.start(STEPS))
    frozen = jax.tree.leaves(trainer.rest)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(rest)] == [(leaf.shape, leaf.dtype) for leaf in frozen]
    assert {leaf.dtype for leaf in jax.tree.leaves(teacher)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_without_a_recipe_nobody_teaches(mesh, data):
    planned = planned_step(CONFIG, None, mesh, data, accumulate=2)
    state, _, _, teacher = planned.arguments
    assert teacher is None
    assert state["average"] == {}
    with jax.set_mesh(mesh):
        assert planned.function.lower(*planned.arguments).compile().memory_analysis() is not None


def test_a_planned_teacher_is_the_one_that_training_holds(mesh, data):
    recipe = recipes.get("qvgen-w4a4", rank=4)
    planned = planned_step(CONFIG, recipe, mesh, data, teacher=recipes.get("rtn-w8a8"))
    held = frozen(place(models.build(CONFIG, dtype=jnp.bfloat16), mesh), recipes.get("rtn-w8a8"), "bfloat16", mesh)
    found, wanted = (
        [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(one)]
        for one in (planned.arguments[3], held)
    )
    assert found == wanted
    assert jnp.dtype("int8") in {leaf.dtype for leaf in jax.tree.leaves(held)}


def test_known_predictions_are_planned_as_a_part_of_the_batch(mesh, data):
    planned = planned_step(CONFIG, recipes.get("lsq-w4a4", target="teacher"), mesh, data, teacher_cache=True)
    _, batch, _, teacher = planned.arguments
    assert teacher is None
    latents, known = batch["latents"], batch["teacher"]
    assert (known.shape, known.sharding, known.dtype) == (latents.shape, latents.sharding, jnp.bfloat16)
    with jax.set_mesh(mesh):
        state, metrics = jax.eval_shape(planned.function, *planned.arguments)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("choice", [{"teacher": recipes.get("rtn-w8a8")}, {"teacher_cache": True}])
@pytest.mark.parametrize("name", [None, "lsq-w4a4"])
def test_a_teacher_where_nobody_teaches_is_refused(mesh, data, name, choice):
    assert planned_step(CONFIG, name and recipes.get(name), mesh, data).arguments[3] is None
    with pytest.raises(UserError, match=f"leave out --{next(iter(choice)).replace('_', '-')}"):
        planned_step(CONFIG, name and recipes.get(name), mesh, data, **choice)


def test_a_recipe_that_cannot_be_trained_is_refused(mesh, data):
    planned = planned_step(CONFIG, recipes.get("minmax-w8a8"), mesh, data)
    with jax.set_mesh(mesh), pytest.raises(UserError, match="needs calibration"):
        planned.function.lower(*planned.arguments)
