import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from qvdjax.nn import Codes, Linear, stacked
from qvdjax.parallel import (
    RULES,
    abstract,
    constrain,
    left_whole,
    make_mesh,
    partition_spec,
    parts,
    place,
    shard_batch,
    shardings,
)


class Block(nnx.Module):
    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up = Linear(16, 24, role="feed_forward_in", axes=("mlp", "embed"), key=up)
        self.down = Linear(24, 16, role="feed_forward_out", axes=("embed", "mlp"), key=down)
        self.codes = Codes(jnp.zeros((24, 16), jnp.int4), axes=("mlp", "embed"), bits=4)

    def __call__(self, x):
        hidden = constrain(jax.nn.gelu(self.up(x)), "batch", "tokens", "mlp")
        return constrain(x + self.down(hidden), "batch", "tokens", None)


def model():
    return stacked(Block, 3, jax.random.key(0))


def run(blocks, x):
    return jax.lax.scan(lambda x, block: (block(x), None), x, blocks)[0]


def test_names_are_right_aligned_so_the_layer_axis_stays_whole():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    assert partition_spec((3, 24, 16), ("mlp", "embed"), mesh)[0] == P(None, "tensor", "fsdp")


def test_weights_spread_over_fsdp_and_context_together():
    mesh = make_mesh({"fsdp": 2, "context": 4})
    assert partition_spec((24, 16), ("mlp", "embed"), mesh)[0] == P(None, ("fsdp", "context"))


def test_an_axis_that_does_not_divide_is_left_whole_and_reported():
    mesh = make_mesh({"fsdp": 2, "context": 4})
    spec, refused = partition_spec((3, 24, 6), ("mlp", "embed"), mesh)  # 6 rows: fsdp divides, fsdp x context does not
    assert spec == P(None, None, "fsdp")
    assert refused == {2: ("context",)}


def test_a_mesh_axis_serves_one_dimension_only():
    mesh = make_mesh({"tensor": 8})
    assert partition_spec((16, 16), ("heads", "mlp"), mesh)[0] == P("tensor", None)


def test_unknown_names_and_too_many_names_are_refused():
    mesh = make_mesh({"tensor": 8})
    with pytest.raises(ValueError, match="no rule for the axis 'width'"):
        partition_spec((16,), ("width",), mesh)
    with pytest.raises(ValueError, match="2 axis names"):
        partition_spec((16,), ("embed", "mlp"), mesh)


def test_shardings_cover_modules_abstract_modules_and_plain_arrays():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    expected = P(None, "tensor", "fsdp")
    for tree in (model(), jax.eval_shape(model)):
        assert shardings(tree, mesh).up.weight.get_value().spec == expected
    assert shardings({"x": jnp.zeros((8,))}, mesh)["x"].spec == P()
    described = abstract(jax.eval_shape(model), mesh)
    assert described.codes.get_value().dtype == jnp.int4
    assert described.codes.get_value().sharding.spec == expected


def test_placed_weights_lie_in_shards_and_the_result_is_the_same():
    blocks, x = model(), jax.random.normal(jax.random.key(1), (4, 8, 16))
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    placed = place(blocks, mesh)
    assert placed.up.weight[...].addressable_shards[0].data.shape == (3, 12, 4)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(placed, shard_batch(x, mesh))
    # Sums of 24 float32 products in another order, three layers deep, values of order one.
    np.testing.assert_allclose(got, run(blocks, x), atol=1e-5)


def test_left_whole_names_what_the_mesh_cannot_split():
    mesh = make_mesh({"context": 8, "tensor": 1})
    assert left_whole(model(), mesh) == []
    rows = left_whole(model(), make_mesh({"tensor": 7}))
    assert {(row["path"], row["axis"], row["size"]) for row in rows} >= {("up.weight", "mlp", 24)}
    assert all(row["mesh_axes"] == ("tensor",) for row in rows)


def test_constrain_does_nothing_without_a_mesh_and_pins_with_one():
    x = jnp.zeros((2, 8, 16))
    assert constrain(x, "batch", "tokens", None) is x
    mesh = make_mesh({"fsdp": 2, "context": 4})
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: constrain(x, "batch", "tokens", None))(x)
    assert pinned.addressable_shards[0].data.shape == (1, 2, 16)
    with jax.set_mesh(make_mesh({"context": 1})):
        assert constrain(x, "batch", "tokens", None) is x


def test_by_how_many_devices_an_axis_is_split():
    assert parts(8, "tokens") == 1
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 4})):
        assert (parts(8, "tokens"), parts(6, "tokens"), parts(6, "batch"), parts(8, "attention_heads")) == (4, 1, 2, 4)
        inside = jax.shard_map(
            lambda x: x + parts(8, "tokens"), in_specs=P("fsdp", "context"), out_specs=P("fsdp", "context")
        )
        assert (inside(jnp.zeros((2, 8))) == 1).all()
    with jax.set_mesh(make_mesh({"tensor": 2, "context": 4})):
        assert parts(16, "attention_heads") == 8


def test_constrain_leaves_the_axes_of_a_shard_map_alone():
    mesh = make_mesh({"fsdp": 2, "context": 4})
    local = lambda x: constrain(x, "batch", "tokens", None) + 1  # noqa: E731
    with jax.set_mesh(mesh):
        out = jax.jit(jax.shard_map(local, in_specs=P("fsdp", "context"), out_specs=P("fsdp", "context")))(
            jnp.zeros((2, 8, 16))
        )
    assert (out == 1).all()


def test_a_batch_that_does_not_divide_is_kept_whole():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    placed = shard_batch({"eight": np.zeros((8, 3)), "one": np.zeros((1, 3))}, mesh)
    assert placed["eight"].sharding.spec == P(("data", "fsdp"))
    assert placed["one"].sharding.is_fully_replicated


def test_every_rule_leads_to_mesh_axes():
    mesh = make_mesh({})
    assert all(axis in mesh.axis_names for axes in RULES.values() for axis in axes)
