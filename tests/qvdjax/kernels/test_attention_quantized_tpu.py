"""The flash kernel of quantized products, in interpret mode: what the plain reference gives, and near the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_attention import distance, exact
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvdjax.errors import UserError
from qvdjax.kernels import quantized_attention
from qvdjax.kernels.attention_quantized_tpu import flash_quantized
from qvdjax.parallel import make_mesh, plan, topology_mesh

BLOCK = 128
flash = functools.partial(flash_quantized, interpret=True, pv_block=BLOCK, query_block=64)
reference = functools.partial(quantized_attention, implementation="simulate", pv_block=BLOCK)


def inputs(queries=77, keys=300, heads=2, head_dim=32, batch=2, dtype=jnp.float32, tails=None):
    """Normal numbers, or of Student's t distribution with so few degrees of freedom."""
    shapes = ((batch, queries, heads, head_dim), (batch, keys, heads, head_dim), (batch, keys, heads, head_dim))
    draw = jax.random.normal if tails is None else lambda key, shape: jax.random.t(key, tails, shape)
    return [draw(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


BITS = [(8, 8), (8, None), (None, 8), (4, 6)]
FLOAT8 = "float8_e4m3fn"


@pytest.mark.parametrize(
    ("qk_bits", "pv_bits", "key_block"), [*((*bits, None) for bits in BITS), (8, 8, 2 * BLOCK), (8, None, 2 * BLOCK)]
)
def test_equals_the_reference(qk_bits, pv_bits, key_block):
    """77 queries in blocks of 64 and 300 keys in blocks of 128: both ragged."""
    arrays = inputs()
    given = {"qk_bits": qk_bits, "pv_bits": pv_bits, "key_block": key_block}
    got, plain = flash(*arrays, **given), reference(*arrays, **given)
    # Scores differ in their last bit, which moves a probability at the edge of two codes by one code: 1 / 255 (or
    # 1 / 63) of a value of about 3 among the probabilities of a row, whose largest may hold all of it.
    allowed = 1e-5 if pv_bits is None else 3 / (2**pv_bits - 1)
    np.testing.assert_allclose(got, plain, atol=allowed)
    assert np.abs(got - plain).mean() < 1e-4


@pytest.mark.parametrize(("qk_bits", "pv_bits", "key_block"), [(8, 8, None), (8, None, 2 * BLOCK), (None, 8, None)])
def test_equals_the_reference_in_float8(qk_bits, pv_bits, key_block):
    arrays = inputs()
    given = {"qk_bits": qk_bits, "pv_bits": pv_bits, "key_block": key_block, "codebook": FLOAT8}
    got, plain = flash(*arrays, **given), reference(*arrays, **given)
    # A probability or a code at the edge of two float8 moves by an eighth of itself, of values of about 3.
    np.testing.assert_allclose(got, plain, atol=3 / 8)
    assert np.abs(got - plain).mean() < 1e-4
    # Three bits of mantissa: each operand is rounded by 2^-4 of itself at most, two thirds of that typically.
    assert distance(got, exact(*arrays)) < 0.08


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"), [(1, 1, 8), (64, 128, 128), (40, 200, 128), (65, 129, 72), (130, 600, 136)]
)
def test_ragged_sizes(queries, keys, head_dim):
    arrays = inputs(queries, keys, 1, head_dim)
    # Two operands of eight bits a product, each rounded to about 2^-8 of its typical size: 2 % leaves a factor of two.
    assert distance(flash(*arrays, qk_bits=8, pv_bits=8), exact(*arrays)) < 0.02


@pytest.mark.parametrize("scales", [(1e-6, 1e-6, 1e-6), (1e4, 1e-4, 1e20), (30.0, 1.0, 1e-20)])
def test_extreme_scales(scales):
    arrays = [a * scale for a, scale in zip(inputs(), scales)]
    tolerance = 0.02 if scales[0] < 1e4 or scales[1] < 1 else 0.05
    if scales[0] == 30.0:
        # A softmax of scores of +-30 picks single keys; an error of 0.4 % of a score of 100 is one of 0.4, which moves
        # probabilities by a third between the two best keys.
        tolerance = 0.3
    assert distance(flash(*arrays, qk_bits=8, pv_bits=8), exact(*arrays)) < tolerance


def test_heavy_tails_and_offsets():
    """Student's t with three degrees of freedom, and channels of keys far from zero, as trained models have them."""
    query, key, value = inputs(128, 512, tails=3.0)
    key = key + 100 * jax.random.normal(jax.random.key(7), key.shape[-2:])
    truth = exact(query, key, value)
    error = lambda **given: distance(flash(query, key, value, qk_bits=8, pv_bits=8, **given), truth)  # noqa: E731
    plain = distance(reference(query, key, value, qk_bits=8, pv_bits=8), truth)
    # Tails of a range of 127 steps cost a factor of several beside normal numbers. The kernel is as good as the
    # reference, and keys that are not smoothed lose their range to the offsets.
    assert error() < 0.08
    assert error() < 1.02 * plain
    assert error(smooth_key=False) > 3 * error()
    assert error(key_block=BLOCK) < 2 * error()


@pytest.mark.parametrize("codebook", [None, FLOAT8])
def test_zero_rows(codebook):
    query, key, value = inputs()
    query, value = query.at[:, 5].set(0), value.at[..., 3].set(0)
    got = flash(query, key, value, qk_bits=8, pv_bits=8, codebook=codebook)
    # A query of zeros averages all values; probabilities of one are exact, values are rounded.
    np.testing.assert_allclose(got[:, 5], value.mean(axis=1), atol=0.01)
    assert (np.asarray(got)[..., 3] == 0).all()
    nothing = flash(*(jnp.zeros_like(a) for a in (query, key, value)), qk_bits=8, pv_bits=8, codebook=codebook)
    assert (np.asarray(nothing) == 0).all()


@pytest.mark.parametrize("codebook", [None, FLOAT8])
def test_nan_comes_through(codebook):
    query, key, value = inputs()
    attend = lambda *a: np.isnan(flash(*a, qk_bits=8, pv_bits=8, codebook=codebook))  # noqa: E731
    spoilt = attend(query.at[0, 3, 1, 2].set(jnp.nan), key, value)
    assert spoilt[0, 3, 1].all()
    assert spoilt.sum() == query.shape[-1]  # no other row
    assert attend(query, key.at[0, 200, 1, 2].set(jnp.nan), value)[0, :, 1].all()
    assert attend(query, key, value.at[0, 200, 1, 2].set(jnp.nan))[0, :, 1, 2].all()


@pytest.mark.parametrize(("qk_bits", "pv_bits"), BITS)
def test_keys_beyond_the_length_are_as_if_not_there(qk_bits, pv_bits):
    query, key, value = inputs()
    lengths = jnp.asarray([129, 37])
    given = {"qk_bits": qk_bits, "pv_bits": pv_bits}
    got = flash(query, key, value, lengths, **given)
    spoilt = flash(query, key.at[1, 40:].set(jnp.nan), value.at[0, 130:].set(1e9), lengths, **given)
    np.testing.assert_array_equal(got, spoilt)
    for i, length in enumerate(lengths.tolist()):
        alone = flash(query[i : i + 1], key[i : i + 1, :length], value[i : i + 1, :length], **given)
        allowed = 1e-5 if pv_bits is None else 3 / (2**pv_bits - 1)  # as above
        np.testing.assert_allclose(got[i : i + 1], alone, atol=allowed if qk_bits != 4 else 0.2)


def test_half_precision_stays_its_type():
    arrays = inputs(dtype=jnp.bfloat16)
    got = flash(*arrays, qk_bits=8, pv_bits=8)
    assert got.dtype == jnp.bfloat16
    assert distance(got, exact(*arrays)) < 0.02


def test_heads_split_over_a_mesh_give_the_same():
    arrays, lengths = inputs(heads=4), jnp.asarray([300, 31])
    alone = flash(*arrays, lengths, qk_bits=8, pv_bits=8)
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 4})):
        split = jax.jit(lambda *a: flash(*a, qk_bits=8, pv_bits=8))(*arrays, lengths)
    # Every head is computed whole, on one device; only fusions around the kernel may differ in a last bit.
    np.testing.assert_allclose(split, alone, atol=3 / 255)
    assert np.abs(split - alone).mean() < 1e-5


def test_refused_where_there_is_no_tpu():
    with pytest.raises(UserError, match="the program is for cpu"):
        quantized_attention(*inputs(), qk_bits=8, pv_bits=8, pv_block=BLOCK, implementation="pallas_tpu")


# v7x has no products of integers in its matrix units, and the compiler refuses them; the others have none of float8.
COMPILED = [("v5e:1x1", 8, None), ("v5p:1x1x1", None, None), ("v6e:1x1", 8, None), ("tpu7x:1x1x1", 8, FLOAT8)]


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize(("name", "pv_bits", "codebook"), COMPILED)
def test_compiles_at_real_shapes_and_keeps_no_scores(name, pv_bits, codebook):
    """Wan 1.3B at 480p, CogVideoX at heads of 64, and a text of 77 tokens."""
    mesh = topology_mesh(name)
    for queries, keys, heads, head_dim in ((32760, 32760, 12, 128), (17776, 17776, 4, 64), (77, 77, 2, 64)):
        one = NamedSharding(mesh, P())
        array = lambda t: jax.ShapeDtypeStruct((1, t, heads, head_dim), jnp.bfloat16, sharding=one)  # noqa: B023, E731
        attend = lambda *a: quantized_attention(  # noqa: E731
            *a, qk_bits=8, pv_bits=pv_bits, codebook=codebook, pv_block=512, implementation="pallas_tpu"
        )
        report = plan(attend, array(queries), array(keys), array(keys), mesh=mesh)
        assert report["fits"]
        # Codes of keys and values, float copies on the way to them, and padding of heads: a few times the arrays, where
        # the scores of one head of Wan's alone take 4 GiB.
        assert report["temporary_bytes"] < 12 * 2 * (queries + 2048) * heads * max(128, head_dim)
