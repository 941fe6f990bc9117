import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvdjax.kernels.attention_splash import splash_attention
from qvdjax.nn import Attention, dot_product_attention
from qvdjax.parallel import make_mesh, plan, topology_mesh
from qvdjax.parallel.program import Program


def inputs(queries, keys, heads=2, batch=2):
    shapes = ((batch, queries, heads, 128), (batch, keys, heads, 128), (batch, keys, heads, 128))
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (200, 77)])
def test_splash_equals_plain_attention(queries, keys):
    arrays = inputs(queries, keys)
    got = splash_attention(*arrays, block=128, interpret=True)
    # Both in float32; the softmax is summed in blocks instead of at once, over at most 256 keys.
    np.testing.assert_allclose(got, dot_product_attention(*arrays, implementation="xla"), atol=5e-6)


def test_keys_beyond_the_length_are_left_out():
    arrays, lengths = inputs(200, 300), jnp.asarray([37, 300])
    got = splash_attention(*arrays, lengths, block=128, interpret=True)
    plain = dot_product_attention(*arrays, lengths, implementation="xla")
    np.testing.assert_allclose(got, plain, atol=5e-6)  # as above


def test_gradients_equal_those_of_plain_attention():
    arrays = inputs(128, 128, heads=1, batch=1)
    loss = lambda f: jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2))(*arrays)  # noqa: E731
    got = loss(lambda *a: splash_attention(*a, block=128, interpret=True))
    for ours, plain in zip(got, loss(lambda *a: dot_product_attention(*a, implementation="xla"))):
        np.testing.assert_allclose(ours, plain, atol=2e-5)  # as above, with one product more


def test_heads_split_over_a_mesh_give_the_same():
    arrays = inputs(128, 128, heads=4)
    alone = splash_attention(*arrays, block=128, interpret=True)
    lengths = jnp.asarray([100, 31])
    padded = splash_attention(*arrays, lengths, block=128, interpret=True)
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 4})):
        split = jax.jit(lambda *a: splash_attention(*a, block=128, interpret=True))
        # Every head is computed whole, on one device.
        np.testing.assert_array_equal(split(*arrays), alone)
        np.testing.assert_array_equal(split(*arrays, lengths), padded)


def test_inside_a_shard_map_each_device_attends_to_its_own():
    arrays = inputs(128, 128, heads=1, batch=2)
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    attend = functools.partial(splash_attention, block=128, interpret=True)
    rows = P("data")
    with jax.set_mesh(mesh):
        split = jax.jit(jax.shard_map(attend, in_specs=rows, out_specs=rows, check_vma=False))(*arrays)
    np.testing.assert_array_equal(split, attend(*arrays))


def test_odd_head_widths_are_refused():
    with pytest.raises(ValueError, match="multiples of 128"):
        splash_attention(*(a[..., :64] for a in inputs(128, 128)))


@pytest.mark.tpu_compile
def test_splash_compiles_for_a_slice_and_keeps_no_scores():
    mesh = topology_mesh("v5e:2x4", {"context": 8})
    tokens, heads = 32760, 40
    spec = NamedSharding(mesh, P(None, "context"))
    array = jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16, sharding=spec)
    report = plan(splash_attention, array, array, array, mesh=mesh)
    # Padded copies of q, k, v and the result in both layouts: a few times their size, where the scores of one
    # chip's five heads alone would take 20 GiB.
    assert report["temporary_bytes"] < 12 * (tokens * heads * 128 * 2 // 8)
    assert {row["kind"] for row in report["collectives"]} == {"all-to-all"}


def lowered_for_eight_chips(keys=1024, head_dim=128, dtype=jnp.bfloat16, implementation=None):
    """The program of one attention over tokens that a described slice holds split."""
    attention = Attention()
    attention.implementation = implementation
    mesh = topology_mesh("v5e:2x4", {"context": 8})
    array = lambda tokens: jax.ShapeDtypeStruct(  # noqa: E731
        (1, tokens, 8, head_dim), dtype, sharding=NamedSharding(mesh, P(None, "context"))
    )
    with jax.set_mesh(mesh):
        return jax.jit(attention.__call__).lower(array(1024), array(keys), array(keys))


@pytest.mark.tpu_compile
def test_attention_is_splash_on_tpu_where_that_suits_and_no_other_is_named():
    kernel = "tpu_custom_call"  # what a Pallas kernel is in a program for TPU
    assert kernel in lowered_for_eight_chips().as_text()
    assert kernel in lowered_for_eight_chips(dtype=jnp.float32).as_text()
    for other in ({"implementation": "xla"}, {"keys": 512}, {"head_dim": 64}, {"dtype": jnp.float16}):
        assert kernel not in lowered_for_eight_chips(**other).as_text(), other


@pytest.mark.tpu_compile
def test_a_slice_exchanges_heads_for_tokens_and_nothing_else():
    program = Program(lowered_for_eight_chips().compile().as_text())
    # Query, key and value to heads, the result back to tokens: each of 1024 tokens of 8 heads over 8 chips.
    exchanged = sum(row["bytes"] for row in program.collectives())
    assert {(row["kind"], row["dtype"]) for row in program.collectives()} == {("all-to-all", "bf16")}
    assert exchanged == 4 * (1024 * 8 * 128 * 2 // 8)
