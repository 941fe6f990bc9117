"""The training step: it learns, continues bit for bit, and distils."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.moving_shapes import data, train
from experiments.training.objective import Objective
from experiments.training.settings import Settings
from experiments.training.states import last_state, save_state
from experiments.training.student import student_of
from experiments.training.trainer import Trainer
from qvdjax import recipes

SMALL = {**train.CONFIGS["wan"], "num_layers": 1, "num_attention_heads": 1, "ffn_dim": 64}
SETTINGS = Settings(batch=2, learning_rate=3e-3, warm_up=5, average=0.9)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(train.initial_model(0, SMALL), SETTINGS, draw=data.batch)


def equal(one, other):
    return all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_loss_goes_down(trainer):
    state, first = trainer.advance(trainer.start(40), 4)
    state, _ = trainer.advance(state, 32)
    _, last = trainer.advance(state, 4)
    # A model that predicts nothing loses E(e - x)^2 = 1 + E x^2, about 1.6; knowing the noise saves 1 of it.
    assert first["loss"] > 1.1
    assert last["loss"] < 0.85 * first["loss"]


def test_runs_continue_bit_for_bit(trainer, tmp_path):
    whole, _ = trainer.advance(trainer.start(10), 10)
    part, _ = trainer.advance(trainer.start(10), 3)
    save_state(tmp_path, part)
    empty = jax.tree.map(jnp.zeros_like, trainer.start(99))  # everything must come from the file
    restored = last_state(tmp_path, empty)
    assert int(restored["step"]) == 3
    assert int(restored["total"]) == 10
    continued, _ = trainer.advance(restored, 7)
    assert equal(whole, continued)


def test_steps_on_given_batches_are_the_steps_by_rule(trainer):
    ruled, _ = trainer.advance(trainer.start(10), 2)
    state = trainer.start(10)
    for step in range(2):
        state, _ = trainer.advance_on(state, data.batch(SETTINGS.seed, step, SETTINGS.batch))
    for a, b in zip(jax.tree.leaves(ruled["params"]), jax.tree.leaves(state["params"]), strict=True):
        # Two programs of the same arithmetic; Adam's first steps are +-rate, so a gradient near zero that is
        # rounded otherwise may move a weight by a part of 2 x 3e-3 x 2/5.
        np.testing.assert_allclose(a, b, atol=2.5e-3)


def test_rate_warms_up_and_ends_low():
    settings = Settings(warm_up=10, learning_rate=1.0, final_rate=0.01)
    rates = [float(settings.rate(jnp.int32(step), jnp.int32(100))) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_the_average_follows_slowly(trainer):
    state, _ = trainer.advance(trainer.start(10), 5)
    shift = lambda name: sum(  # noqa: E731
        float(jnp.abs(a - b).sum())
        for a, b in zip(jax.tree.leaves(state[name]), jax.tree.leaves(trainer.initial), strict=True)
    )
    assert 0 < shift("average") < shift("params")


@pytest.mark.slow
def test_distillation_moves_a_rounded_student_towards_the_teacher():
    teacher = train.initial_model(3, SMALL)
    teacher.proj_out.weight[...] = 0.1 * jax.random.normal(jax.random.key(0), teacher.proj_out.weight.shape)
    settings = dataclasses.replace(
        SETTINGS, learning_rate=1e-4, final_rate=1e-6, warm_up=5, objective=Objective(data=0.0, teacher=1.0)
    )
    student = student_of(teacher, recipes.get("rtn-w4a4"), 60)
    rounded = lambda model: student.at(model, jnp.int32(0))  # noqa: E731

    @jax.jit
    def loss(student):
        return settings.objective(student, data.batch(0, 999, 8), jax.random.key(0), teacher)

    # The same function twice in one program, fused otherwise: float32 rounding, squared.
    assert loss(teacher) < 1e-10
    assert loss(rounded(nnx.clone(teacher))) > 1e-5
    trainer = Trainer(teacher, settings, teacher=teacher, student=student, draw=data.batch)
    state, _ = trainer.advance(trainer.start(60), 60)
    # The same clips, noise and noise levels before and after; training saw others.
    assert loss(rounded(trainer.model(state, averaged=False))) < loss(rounded(nnx.clone(teacher)))


def test_the_first_frames_are_trained_on():
    class Scaled(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.float32(0.0))

        def __call__(self, latents, timestep, context):
            seen.add(latents.shape[:2])
            return self.scale[...] * latents

    for frames, wanted in ((2, 2), (None, 9)):
        seen = set()
        trainer = Trainer(Scaled(), dataclasses.replace(SETTINGS, frames=frames), draw=data.batch)
        trainer.advance(trainer.start(3), 1)
        assert seen == {(SETTINGS.batch, wanted)}
