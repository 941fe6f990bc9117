"""Learned clips of activation ranges: values and gradients against their closed forms, and which row is used."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.nn import InputClip, LayerScheme
from qvdjax.numerics import Quantizer
from qvdjax.qat.learned_clips import fake_quantize_clipped, start_logits, table

BATCH, TOKENS, WIDTH = 2, 3, 9
ONE = InputClip()


def inputs():
    return jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, TOKENS, WIDTH)) + 0.3, jnp.float32)


def quantizer(symmetric, bits=3):
    return Quantizer(bits, symmetric, "token", dynamic=True)


def clipped(x, logits, symmetric, clip=ONE, timestep=None):
    return fake_quantize_clipped(x, quantizer(symmetric), clip.factors(table(logits, clip), timestep, x))


def by_hand(x, logits, symmetric, upstream):
    """Values, and gradients of sum upstream * x^ towards the logits and x, token by token in float64."""
    x, upstream = np.asarray(x, np.float64), np.asarray(upstream, np.float64)
    sigmoid = 1 / (1 + np.exp(-np.asarray(logits, np.float64)[0]))
    slope = sigmoid * (1 - sigmoid)
    values, of_x, of_logits = np.zeros_like(x), np.zeros_like(x), np.zeros(len(sigmoid))
    for index in np.ndindex(x.shape[:-1]):
        token, g = x[index], upstream[index]
        if symmetric:
            end = np.abs(token).argmax()
            s, z, low, high = 0.95 * sigmoid[0] * abs(token[end]) / 3, 0, -4, 3
            toward_ends = {end: 0.95 * sigmoid[0] * np.sign(token[end]) / 3}
            toward_logits = np.array([0.95 * slope[0] * abs(token[end]) / 3])
        else:
            a, b = token.argmin(), token.argmax()
            low_end, high_end = (0.95 * f * token[i] for f, i in zip(sigmoid, (a, b), strict=True))
            s, low, high = (high_end - low_end) / 7, 0, 7
            z = np.clip(-np.round(low_end / s), 0, 7)
            toward_ends = {a: -0.95 * sigmoid[0] / 7, b: 0.95 * sigmoid[1] / 7}
            toward_logits = 0.95 * slope * np.array([-token[a], token[b]]) / 7
        code = np.clip(np.round(token / s) + z, low, high)
        inside = (np.round(token / s) + z >= low) & (np.round(token / s) + z <= high)
        of_scale = (g * ((code - z) - inside * token / s)).sum()
        values[index] = s * (code - z)
        of_x[index] = g * inside
        for end, toward in toward_ends.items():
            of_x[(*index, end)] += of_scale * toward
        of_logits += of_scale * toward_logits
    return values, of_logits[None], of_x


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_and_gradients_are_the_closed_forms(symmetric):
    x, logits = inputs(), jnp.array([[1.3]]) if symmetric else jnp.array([[1.3, 0.4]])
    upstream = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    values, of_logits, of_x = by_hand(x, logits, symmetric, upstream)
    assert (np.asarray(of_x == np.asarray(upstream))).any()  # entries that are neither clipped nor an end
    # Float32 operations on numbers near 1, sums of at most 54 of them.
    chex.assert_trees_all_close(clipped(x, logits, symmetric), values.astype(np.float32), rtol=1e-5, atol=1e-6)
    got = jax.grad(lambda logits, x: (upstream * clipped(x, logits, symmetric)).sum(), (0, 1))(logits, x)
    wanted = (of_logits.astype(np.float32), of_x.astype(np.float32))
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_differences_where_inputs_are_clipped():
    """Tokens of two entries, both clipped: x^ is (code - z) s, and smooth in the logits while z stays put."""
    x = jnp.array([[-1.0, 1.0], [-2.0, 2.1]])
    logits = jnp.array([[-0.2, -0.25]])
    total = lambda logits: jnp.square(clipped(x, logits, symmetric=False)).sum()  # noqa: E731
    gradient = jax.grad(total)(logits)
    for side in range(2):
        step = jnp.zeros((1, 2)).at[0, side].set(1e-2)
        # Curvature leaves 1e-4 of the slope at this step, float32 1e-5.
        np.testing.assert_allclose(gradient[0, side], (total(logits + step) - total(logits - step)) / 2e-2, rtol=1e-2)


def test_start_is_the_releases():
    for symmetric, sides in ((True, 1), (False, 2)):
        logits = start_logits(InputClip("bins", 50), symmetric)
        assert logits.shape == (50, sides)
        # 0.95 * 0.95, through a float32 logit and back.
        chex.assert_trees_all_close(table(logits, ONE), jnp.full((50, sides), 0.9025), rtol=1e-6)
        chex.assert_trees_all_close(InputClip("bins", 50).start_table(symmetric), table(logits, ONE), rtol=1e-6)


def test_rows_by_timestep():
    timestep = jnp.array([0.0, 19.9, 20.0, 317.6, 999.0, 1000.0])
    assert InputClip("bins", 50).rows(timestep).tolist() == [0, 0, 1, 15, 49, 49]
    assert InputClip("residue", 50).rows(timestep).tolist() == [0, 19, 20, 17, 49, 0]


def test_each_sample_has_its_own_row():
    clip, timestep = InputClip("bins", 4), jnp.array([100.0, 900.0])
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((4, 2)), jnp.float32)
    together = clipped(inputs(), logits, False, clip, timestep)
    for sample, row in enumerate((0, 3)):
        alone = clipped(inputs()[sample : sample + 1], logits[row : row + 1], False)
        chex.assert_trees_all_close(together[sample : sample + 1], alone, rtol=1e-6)  # the same float32 operations
    gradient = jax.grad(lambda logits: clipped(inputs(), logits, False, clip, timestep).sum())(logits)
    assert (np.asarray(gradient) != 0).any(axis=1).tolist() == [True, False, False, True]


def test_frames_folded_into_the_batch_share_their_samples_row():
    clip, timestep = InputClip("bins", 4), jnp.array([100.0, 900.0])
    factors = jnp.arange(8.0).reshape(4, 2)
    x = jnp.zeros((6, TOKENS, WIDTH))  # two samples of three frames
    low, high = clip.factors(factors, timestep, x)
    assert low.shape == (6, 1, 1)
    assert low[:, 0, 0].tolist() == [0, 0, 0, 6, 6, 6]
    assert high[:, 0, 0].tolist() == [1, 1, 1, 7, 7, 7]
    with pytest.raises(UserError, match="5 rows"):
        clip.factors(factors, timestep, x[:5])


def test_a_token_of_one_sign_keeps_its_largest_entry():
    x = jnp.linspace(4.0, 5.0, WIDTH)[None, None]
    rounded = clipped(x, jnp.full((1, 2), 20.0), False, InputClip(ratio=1.0))
    np.testing.assert_allclose(rounded[0, 0, -1], 5.0, rtol=1e-6)  # without zero in the range: at most 1


@pytest.mark.parametrize("wrong", [{"index": "two"}, {"index": "one", "count": 2}, {"index": "bins", "count": 0},
                                   {"start": 1.0}, {"ratio": 0.0}])  # fmt: skip
def test_clips_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        InputClip(**wrong)


def test_a_clip_needs_a_dynamic_range():
    for activation in (None, Quantizer(8, granularity="tensor")):
        with pytest.raises(ValueError, match="dynamic"):
            LayerScheme(Quantizer(4), activation, input_clip=ONE)


def test_schemes_with_and_without_clip_as_plain_fields():
    scheme = LayerScheme(Quantizer(4), quantizer(False), input_clip=InputClip("bins", 50))
    assert LayerScheme.from_dict(scheme.to_dict()) == scheme
    assert "input_clip" not in LayerScheme(Quantizer(4), quantizer(False)).to_dict()
