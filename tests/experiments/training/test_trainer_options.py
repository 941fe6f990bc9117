"""Options of the training step on a model of one matrix: meshes, micro-batches, precision, rates, steps left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.training.objective import Objective
from experiments.training.settings import Settings
from experiments.training.student import Student
from experiments.training.trainer import Trainer
from qvdjax.errors import UserError
from qvdjax.nn import LayerScheme, Linear, PerCall, stacked
from qvdjax.numerics import Quantizer
from qvdjax.parallel import make_mesh
from qvdjax.qat import FakeQuantizedLinear

CHANNELS, BATCH = 8, 8
SETTINGS = Settings(batch=BATCH, learning_rate=1e-2, warm_up=1, average=0.9, objective=Objective(drop_caption=0.0))


class Gain(nnx.Param):
    """A kind of parameter of its own."""


class Tiny(nnx.Module):
    """One matrix over the channels, and a gain; takes what a VideoModel takes."""

    def __init__(self):
        axes = ("mlp", "embed")
        self.linear = Linear(CHANNELS, CHANNELS, role="head", axes=axes, key=jax.random.key(0), bias=False)
        self.gain = Gain(jnp.ones(()), axes=())
        self.kept = nnx.Param(jnp.ones(()), axes=(), keep_float32=True)
        self.gate = PerCall(jnp.ones(()))

    def __call__(self, latents, timestep, context, *, remat=False):
        latents = latents.astype(self.gain[...].dtype)
        return self.linear(latents) * self.gain[...] * self.kept[...].astype(latents.dtype)


@pytest.fixture(scope="module")
def batches():
    keys = jax.random.split(jax.random.key(5), 3)
    return [
        {"latents": jax.random.normal(key, (BATCH, 1, 2, 2, CHANNELS)), "context": jnp.ones((BATCH, 1, 3))}
        for key in keys
    ]


def trained(settings, batches, **options):
    trainer = Trainer(Tiny(), settings, **options)
    state = trainer.start(10)
    for batch in batches:
        state, metrics = trainer.advance_on(state, batch)
    return trainer, state, metrics


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state["params"])]


def close(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        # Sums in another order. Adam's first steps are the gradient over its own size, so float32 rounding of
        # the gradient (1e-7 of its largest entry) stays that small a part of the rate of 1e-2 but where an entry of
        # the gradient is itself 1e-4 of the largest.
        np.testing.assert_allclose(a, b, atol=1e-2 * 1e-3)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_are_the_whole_batch(batches, accumulate):
    _, whole, one = trained(SETTINGS, batches)
    _, parts, other = trained(dataclasses.replace(SETTINGS, accumulate=accumulate), batches)
    close(whole, parts)
    assert float(one["gradient_norm"]) == pytest.approx(float(other["gradient_norm"]), rel=1e-5)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_trains_what_one_device_trains(batches, sizes):
    mesh = make_mesh(sizes)
    _, alone, _ = trained(SETTINGS, batches)
    trainer, spread, _ = trained(SETTINGS, batches, mesh=mesh)
    close(alone, spread)
    for part in ("params", "average"):
        weight = spread[part]["linear"]["weight"].get_value()
        assert len({str(shard.index) for shard in weight.addressable_shards}) > 1, part
    moment = spread["optimizer"][1].mu["linear"]["weight"].get_value()
    assert moment.sharding == spread["params"]["linear"]["weight"].get_value().sharding
    assert trainer.model(spread).linear.weight.shape == (CHANNELS, CHANNELS)


def test_a_step_that_is_not_finite_is_left_out(batches):
    bad = {**batches[1], "latents": batches[1]["latents"].at[3].set(jnp.nan)}
    trainer = Trainer(Tiny(), SETTINGS)
    state, metrics = trainer.advance_on(trainer.start(10), batches[0])
    assert int(metrics["left_out"]) == 0
    before = leaves(state)
    state, metrics = trainer.advance_on(state, bad)
    assert int(metrics["left_out"]) == 1
    assert (int(state["step"]), int(state["skipped"])) == (2, 1)
    assert all((a == b).all() for a, b in zip(before, leaves(state), strict=True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["optimizer"]))
    trainer.check(state)
    for _ in range(SETTINGS.tolerated):
        state, _ = trainer.advance_on(state, bad)
    with pytest.raises(UserError, match="at step 5 .* not been finite for 4 steps"):
        trainer.check(state)
    state, _ = trainer.advance_on(state, batches[2])
    assert int(state["skipped"]) == 0
    assert any((a != b).any() for a, b in zip(before, leaves(state), strict=True))


def test_means_leave_out_what_was_left_out(batches):
    def draw(seed, step, size):
        return {**batches[0], "latents": jnp.where(step == 1, jnp.nan, batches[0]["latents"])}

    trainer = Trainer(Tiny(), SETTINGS, draw=draw)
    state, metrics = trainer.advance(trainer.start(10), 3)
    assert int(metrics["left_out"]) == 1
    assert np.isfinite(float(metrics["loss"]))
    assert int(state["skipped"]) == 0


def test_kinds_of_parameters_move_at_their_own_rate(batches):
    _, still, _ = trained(dataclasses.replace(SETTINGS, group_rates={Gain: 0.0}), batches)
    _, slow, _ = trained(dataclasses.replace(SETTINGS, group_rates={Gain: 0.5}), batches[:1])
    _, full, _ = trained(SETTINGS, batches[:1])
    gain = lambda state: float(state["params"]["gain"].get_value())  # noqa: E731
    assert gain(still) == 1.0
    assert gain(slow) - 1 == pytest.approx((gain(full) - 1) / 2, rel=1e-4)  # float32 numbers near 1
    assert (slow["params"]["linear"]["weight"].get_value() == full["params"]["linear"]["weight"].get_value()).all()


def test_no_average_keeps_no_copy(batches):
    trainer, state, _ = trained(dataclasses.replace(SETTINGS, average=None), batches[:1])
    assert state["average"] == {}
    assert (trainer.model(state).gain[...] == state["params"]["gain"].get_value()).all()


def test_bfloat16_computes_narrow_and_keeps_wide(batches):
    seen = {}

    class Watched(Tiny):
        def __call__(self, latents, timestep, context, *, remat=False):
            seen.update(gain=self.gain[...].dtype, kept=self.kept[...].dtype, weight=self.linear.weight[...].dtype)
            seen.update(remat=remat, gate=self.gate[...].dtype)
            return super().__call__(latents, timestep, context)

    class Rounded(Student):
        def at(self, model, step):
            model.linear = FakeQuantizedLinear(model.linear, LayerScheme(Quantizer(4, True, "channel")))
            return model

    narrow = dataclasses.replace(SETTINGS, dtype="bfloat16", remat=True)
    for student, weight in ((Student(), jnp.bfloat16), (Rounded(), jnp.float32)):
        trainer = Trainer(Watched(), narrow, student=student)
        state, metrics = trainer.advance_on(trainer.start(3), batches[0])
        assert seen == {"gain": jnp.bfloat16, "kept": jnp.float32, "weight": weight, "remat": True, "gate": jnp.float32}
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state["params"]))
        assert np.isfinite(float(metrics["loss"]))


class Stacked(Tiny):
    """A stack of two such matrices, as a model of blocks has them."""

    def __init__(self):
        super().__init__()
        self.stacks = nnx.List([nnx.Dict(block=stacked(lambda key: _linear(key), 2, jax.random.key(1)))])

    def __call__(self, latents, timestep, context, *, remat=False):
        for layer in range(2):
            latents = latents + latents @ self.stacks[0]["block"].weight[...][layer].T
        return super().__call__(latents, timestep, context)


def _linear(key):
    return Linear(CHANNELS, CHANNELS, role="query", axes=("heads", "embed"), key=key)


def test_muon_moves_the_blocks_matrices_by_orthogonal_steps(batches):
    settings = dataclasses.replace(SETTINGS, optimizer="muon", weight_decay=0.0)
    trainer = Trainer(Stacked(), settings)
    before = trainer.initial["stacks"][0]["block"]["weight"].get_value()
    state, metrics = trainer.advance_on(trainer.start(10), batches[0])
    assert int(metrics["left_out"]) == 0
    step = np.asarray(before - state["params"]["stacks"][0]["block"]["weight"].get_value()) / 1e-2
    for layer in step:
        # 0.2 sqrt(8) times an orthogonal matrix, as far as five Newton-Schulz steps go: they bring singular values to
        # 0.7 to 1.2, but not one that was below a hundredth of the others.
        values = np.linalg.svd(layer, compute_uv=False) / (0.2 * CHANNELS**0.5)
        assert values[0] < 1.4, values
        assert values[-2] > 0.6, values
    other = np.asarray(
        trainer.initial["linear"]["weight"].get_value() - state["params"]["linear"]["weight"].get_value()
    )
    # Adam with Nesterov's look-ahead: the first step is the rate times 0.9 x 0.1 / (1 - 0.81) + 1.
    assert np.abs(other).max() == pytest.approx(1.4737e-2, rel=1e-3)


def test_weights_from_a_folder_are_compiled_for_once(batches):
    """Arrays that were read are tied to their device, those made here are not: another program for the compiler."""
    model = jax.device_put(Tiny(), jax.devices()[0])
    trainer = Trainer(model, SETTINGS)
    state = trainer.start(10)
    for batch in batches:
        state, _ = trainer.advance_on(state, batch)
    assert trainer.run_on._cache_size() == 1
