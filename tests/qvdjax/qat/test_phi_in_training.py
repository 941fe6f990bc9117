"""Phi in a whole model: it begins nearest to the unrounded weights, and one step trains it in every layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qvdjax.nn.variables import iterate
from qvdjax.qat import LearnedLinear, learned, with_gamma, with_low_rank, without_auxiliary
from qvdjax.qat.phases import begin_step
from qvdjax.qat.phi import Factor, LowRank
from qvdjax.qat.rank_decay import RankDecay


def layers(model, kind):
    return dict(iterate(model, kind))


def test_every_rounded_layer_begins_nearest_to_its_own_weight(toy, schemes_of):
    rounded = learned(toy, schemes_of())
    model = with_low_rank(rounded, rank=3)
    assert not layers(rounded, LowRank)  # left as it was
    assert len(layers(model, LowRank)) == len(layers(model, LearnedLinear)) == 3
    for layer in layers(model, LearnedLinear).values():
        stacked = layer.weight[...].ndim == 3
        own = jax.vmap(lambda layer: layer.rounded_weight())(layer) if stacked else layer.rounded_weight()
        residual = np.asarray(layer.weight[...] - own)
        left = residual - np.asarray(layer.auxiliary.weight(jnp.ones(3)))
        values = np.linalg.svd(residual, compute_uv=False)
        # What the truncated decomposition leaves is the energy of the other singular values (float32).
        np.testing.assert_allclose(np.sum(left**2, (-1, -2)), np.sum(values[..., 3:] ** 2, -1), rtol=1e-3)
        assert layer.auxiliary.left.get_metadata()["axes"] == (layer.axes[0], None)


def test_with_all_directions_weights_are_as_if_never_rounded(toy, schemes_of, inputs_of):
    schemes = {name: dataclasses.replace(one, input_clip=None) for name, one in schemes_of(bits=8).items()}
    model = with_low_rank(learned(toy, schemes), rank=6)  # each layer is 6 wide on one side
    out = with_gamma(model, jnp.ones(6))(**inputs_of())
    closed = with_gamma(model, jnp.zeros(6))(**inputs_of())
    plain = learned(toy, schemes)(**inputs_of())
    np.testing.assert_array_equal(closed, plain)  # closed gates: zero is added
    float_out = toy(**inputs_of())
    # Inputs are still rounded to 8 bits, half a step of 1/255 of their range, in three layers; weights no longer.
    assert float(jnp.abs(out - float_out).max()) < 0.02 * float(jnp.abs(float_out).max())


def test_training_through_all_phases_ends_without_phi(toy, schemes_of, inputs_of):
    decay = RankDecay(6, rank=4, phases="code")  # three phases of two steps
    graph, params, rest = nnx.split(with_low_rank(learned(toy, schemes_of()), rank=4), nnx.Param, ...)
    inputs, adam = inputs_of(), optax.adam(1e-2)
    target = toy(**inputs)

    @jax.jit
    def train(params, state, step):
        params, state, _ = begin_step(params, state, step, decay)

        def loss(params):
            model = with_gamma(nnx.merge(graph, params, rest), decay.gamma(step))
            return jnp.mean((model(**inputs) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    def alive(params):
        """Directions of each Phi that are not zero."""
        factors = nnx.split_state(params, Factor, ...)[0]
        pairs = dict(nnx.to_flat_state(factors))
        return {int((jnp.abs(f[...]).sum(-2) > 0).sum(-1).max()) for path, f in pairs.items() if path[-1] == "left"}

    state, seen, values = adam.init(params), [], []
    for step in range(8):
        params, state, value = train(params, state, step)
        seen.append(alive(params))
        values.append(float(value))
    assert seen == [{4}] * 2 + [{2}] * 2 + [{1}] * 2 + [{0}] * 2
    assert np.isfinite(values).all()
    # Nothing is left: the model computes what it does without any module.
    plain = without_auxiliary(nnx.merge(graph, params, rest))
    with_module = with_gamma(nnx.merge(graph, params, rest), decay.gamma(8))
    np.testing.assert_array_equal(plain(**inputs), with_module(**inputs))
