"""Crossing a phase of rank decay inside a training step: parameters, optimizer, averages; on eight devices too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import Linear
from qvdjax.parallel import Program, abstract, make_mesh, place, shardings
from qvdjax.qat.orthogonal import reorthogonalize
from qvdjax.qat.phases import begin_step
from qvdjax.qat.phi import low_rank
from qvdjax.qat.rank_decay import RankDecay

DECAY = RankDecay(12, rank=4, phases="code")  # ranks 4, 2, 1 from steps 0, 4, 8; gone from 12


class Layer(nnx.Module):
    def __init__(self, rows, columns, layers, axes):
        keys = jax.random.split(jax.random.key(rows))
        self.linear = Linear(columns, rows, role="query", axes=axes, key=keys[0])
        residual = jax.random.normal(keys[1], (*layers, rows, columns))
        self.phi = low_rank(residual, DECAY.rank, axes=axes, start="random", key=keys[1])


class Model(nnx.Module):
    def __init__(self, size=1):
        self.stacked = Layer(8 * size, 6 * size, (2,), ("mlp", "embed"))
        self.alone = Layer(5 * size, 7 * size, (), ("embed", "mlp"))


def parameters(size=1):
    return nnx.split(Model(size), nnx.Param)[1]


def filled(tree, seed):
    """The tree with positive random numbers, as moments that are to be told apart."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [jax.random.uniform(k, a.shape) if jnp.issubdtype(a.dtype, jnp.floating) else a for k, a in zip(keys, leaves)]
    return jax.tree.unflatten(structure, new)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))


@functools.partial(jax.jit, static_argnames="second_moments")
def begin(params, optimizer, step, averages, second_moments="follow"):
    return begin_step(params, optimizer, step, DECAY, averages=averages, second_moments=second_moments)


def example():
    params = filled(parameters(), 1)
    return params, filled(OPTIMIZER.init(params), 2), (filled(params, 3),)


@pytest.mark.parametrize("step", [0, 1, 3, 5, 11, 13])
def test_within_a_phase_nothing_moves(step):
    before = example()
    after = begin(before[0], before[1], step, before[2])
    assert jax.tree.structure(after) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize(("step", "active"), [(4, 2), (8, 1)])
@pytest.mark.parametrize("name", ["stacked", "alone"])
def test_where_a_phase_starts_everything_follows(step, active, name):
    params, optimizer, averages = example()
    new, moved, new_averages = begin(params, optimizer, step, averages)

    def pair(tree):
        return tree[name]["phi"]["left"][...], tree[name]["phi"]["right"][...]

    left, right, change = reorthogonalize(*pair(params), active)
    adam, moved_adam = optimizer[1], moved[1]
    expected = {
        "factors": ((left, right), pair(new)),
        "mu": (change.gradients(*pair(adam.mu)), pair(moved_adam.mu)),
        "nu": (change.squares(*pair(adam.nu)), pair(moved_adam.nu)),
        "averages": (change.factors(*pair(averages[0])), pair(new_averages[0])),
    }
    for there, here in expected.values():
        # The same arithmetic compiled together; numbers near 1 with a condition of ten or so.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), here, there)
    gamma = DECAY.gamma(step)
    before, after = ((pair(tree)[0] * gamma) @ pair(tree)[1] for tree in (params, new))
    np.testing.assert_allclose(after, before, atol=1e-5)  # what the model computes: float32 sums of numbers below 1
    for tree in (params, optimizer, averages), (new, moved, new_averages):
        tree[0]["stacked"].pop("phi"), tree[0]["alone"].pop("phi")
    jax.tree.map(np.testing.assert_array_equal, new, params)  # all but Phi stays


def test_at_the_end_nothing_is_left():
    params, optimizer, averages = example()
    new, moved, _ = begin(params, optimizer, 12, averages)
    for tree in (new, moved[1].mu, moved[1].nu):
        assert not any(leaf.any() for leaf in jax.tree.leaves(tree["stacked"]["phi"]))
    assert jax.tree.leaves(new["stacked"]["linear"])[0].any()


def test_second_moments_may_be_reset():
    params, optimizer, averages = example()
    _, moved, _ = begin(params, optimizer, 4, averages, second_moments="reset")
    assert not any(leaf.any() for leaf in jax.tree.leaves(moved[1].nu["alone"]["phi"]))
    assert jax.tree.leaves(moved[1].mu["alone"]["phi"])[0].any()
    _, same, _ = begin(params, optimizer, 5, averages, second_moments="reset")
    jax.tree.map(np.testing.assert_array_equal, same, optimizer)
    with pytest.raises(UserError, match="follow, reset"):
        begin_step(params, optimizer, 4, DECAY, second_moments="forget")


def test_momentum_and_muon_follow_too():
    params = filled(parameters(), 1)
    for optimizer in (optax.trace(0.9), optax.contrib.scale_by_muon()):
        state = filled(optimizer.init(params), 2)
        held = state.trace if hasattr(state, "trace") else state.mu
        moved = jax.jit(lambda p, s: begin_step(p, s, 4, DECAY))(params, state)[1]
        new = moved.trace if hasattr(moved, "trace") else moved.mu
        _, _, change = reorthogonalize(*(params["alone"]["phi"][n][...] for n in ("left", "right")), 2)
        expected = change.gradients(*(held["alone"]["phi"][n][...] for n in ("left", "right")))
        for name, value in zip(("left", "right"), expected):
            np.testing.assert_allclose(new["alone"]["phi"][name][...], value, rtol=1e-4, atol=1e-4)


def test_what_cannot_follow_is_refused():
    params = parameters()
    with pytest.raises(ValueError, match="nu_max"):
        begin_step(params, optax.scale_by_amsgrad().init(params), 4, DECAY)
    with pytest.raises(UserError, match="has rank 4, its decay has 8"):
        begin_step(params, None, 4, RankDecay(100, rank=8))


def test_models_without_phi_pass():
    params = nnx.split(Linear(3, 4, role="query", axes=(None, None), key=jax.random.key(0)), nnx.Param)[1]
    state = OPTIMIZER.init(params)
    assert begin_step(params, state, 4, DECAY) == (params, state, ())


def test_on_eight_devices_only_small_matrices_travel():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    params = filled(parameters(16), 1)  # stacked: 2 x [128, 96], alone: [80, 112]; the factors have 4 columns
    optimizer = filled(OPTIMIZER.init(params), 2)
    trees = (params, optimizer)
    placed = shardings(trees, mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32)

    def cross(trees, step):
        return begin_step(*trees, step, DECAY)[:2]

    with jax.set_mesh(mesh):
        compiled = jax.jit(cross, in_shardings=(placed, None), out_shardings=placed).lower(abstract(trees, mesh), step)
        compiled = compiled.compile()
        there = compiled(place(trees, mesh), jnp.int32(4))
    moved = Program(compiled.as_text()).collectives()
    assert moved  # the factors are spread, so something has to travel
    # The R of every block, [4 devices x 4, 4] in float32; the smallest factor is [80, 4], the smallest L R [80, 112].
    assert max(row["bytes"] / row["count"] for row in moved) <= 4 * 4 * 4 * 4
    here = jax.jit(cross)(trees, jnp.int32(4))
    # QR in blocks sums in another order; moments pass a basis whose condition is about ten.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3), there, here)
