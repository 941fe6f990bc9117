import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvdjax.kernels.attention_splash import splash_attention
from qvdjax.nn import dot_product_attention
from qvdjax.parallel import make_mesh, plan, topology_mesh


def inputs(queries, keys, heads=2, batch=2):
    shapes = ((batch, queries, heads, 128), (batch, keys, heads, 128), (batch, keys, heads, 128))
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (200, 77)])
def test_splash_equals_plain_attention(queries, keys):
    arrays = inputs(queries, keys)
    got = splash_attention(*arrays, block=128, interpret=True)
    # Both in float32; the softmax is summed in blocks instead of at once, over at most 256 keys.
    np.testing.assert_allclose(got, dot_product_attention(*arrays, implementation="xla"), atol=5e-6)


def test_gradients_equal_those_of_plain_attention():
    arrays = inputs(128, 128, heads=1, batch=1)
    loss = lambda f: jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2))(*arrays)  # noqa: E731
    got = loss(lambda *a: splash_attention(*a, block=128, interpret=True))
    for ours, plain in zip(got, loss(lambda *a: dot_product_attention(*a, implementation="xla"))):
        np.testing.assert_allclose(ours, plain, atol=2e-5)  # as above, with one product more


def test_heads_split_over_a_mesh_give_the_same():
    arrays = inputs(128, 128, heads=4)
    alone = splash_attention(*arrays, block=128, interpret=True)
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 4})):
        split = jax.jit(lambda *a: splash_attention(*a, block=128, interpret=True))(*arrays)
    np.testing.assert_array_equal(split, alone)  # every head is computed whole, on one device


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
