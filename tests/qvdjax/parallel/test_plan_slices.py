import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvdjax.errors import UserError
from qvdjax.nn import Linear, QuantizedLinear
from qvdjax.nn.scheme import LayerScheme
from qvdjax.numerics import Quantizer, quantize
from qvdjax.parallel import abstract, chip_bytes, make_mesh, plan, topology_mesh


def quantized(width, layers, bits):
    """A stack of W<bits>A8 linears with random codes, as an abstract module."""
    scheme = LayerScheme(weight=Quantizer(bits), activation=Quantizer(8, granularity="token", dynamic=True))

    def one(key):
        linear = Linear(width, width, role="feed_forward_in", axes=("mlp", "embed"), key=key, bias=False)
        weight = quantize(linear.weight[...], scheme.weight)
        return QuantizedLinear(
            weight=weight, bias=None, role=linear.role, axes=linear.axes, scheme=scheme, execution="integer"
        )

    return jax.eval_shape(lambda: jax.vmap(one)(jax.random.split(jax.random.key(0), layers)))


def step(stack, x):
    return jax.lax.scan(lambda x, layer: (layer(x), None), x, stack)[0]


def described(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def test_bytes_are_those_of_the_arguments_and_more_on_a_real_mesh():
    mesh = make_mesh({"fsdp": 8})
    model = abstract(quantized(256, 6, 8), mesh)
    report = plan(step, model, described(mesh, (8, 32, 256), jnp.float32, "fsdp"), mesh=mesh)
    assert report["fits"]
    assert report["chip_bytes"] is None  # no limit is known for a CPU
    weights, activations = 6 * 256 * 256 // 8 + 6 * 256 * 4, 32 * 256 * 4
    assert report["argument_bytes"] == weights + activations
    assert report["bytes_per_chip"] > report["argument_bytes"]
    assert {"kind": "all-gather", "dtype": "s8", "bytes": 6 * 256 * 256, "count": 6} in report["collectives"]


@pytest.mark.tpu_compile
def test_a_small_quantized_stack_compiles_for_a_tpu_slice_with_integer_products_and_narrow_gathers():
    mesh = topology_mesh("v5e:2x4", {"fsdp": 8})
    for bits, code in ((8, "s8"), (4, "s4")):
        model = abstract(quantized(1024, 12, bits), mesh)
        report = plan(step, model, described(mesh, (8, 256, 1024), jnp.bfloat16, "fsdp"), mesh=mesh)
        assert report["fits"]
        assert report["chip_bytes"] == round(15.75 * 2**30)
        codes = 12 * 1024 * 1024 * bits // 8
        # The codes of one chip at their logical width; scales, activations and temporaries come on top.
        assert codes // 8 < report["argument_bytes"] < 2 * codes // 8 + 2**20
        integer = [row for row in report["products"] if row["result"] == "s32"]
        assert sum(row["count"] for row in integer) == 12
        assert {row["left"] for row in integer} | {row["right"] for row in integer} <= {"s8", code}
        gathered = [row for row in report["collectives"] if row["kind"] == "all-gather" and row["dtype"] == code]
        assert sum(row["bytes"] for row in gathered) == codes


@pytest.mark.tpu_compile
def test_what_is_too_large_does_not_fit_and_says_why():
    mesh = topology_mesh("v5e:1x1")
    wide = described(mesh, (64, 1024, 1024, 128), jnp.float32)
    report = plan(lambda a, b: a + b, wide, wide, mesh=mesh)
    assert report["fits"] is False
    assert report["bytes_per_chip"] > report["chip_bytes"]
    assert "RESOURCE_EXHAUSTED" in report["reason"]


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("name", "devices", "gib"),
    [("v5e:2x4", 8, 15.75), ("v5p:2x2x1", 4, 95.74), ("v6e:1x1", 1, 31.25), ("tpu7x:2x2x1", 8, 94.75)],
)
def test_slices_are_described_without_hardware(name, devices, gib):
    mesh = topology_mesh(name)
    assert mesh.devices.size == mesh.shape["context"] == devices
    assert chip_bytes(mesh.devices.flat[0]) == round(gib * 2**30)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", ["v5e", "v99:2x2", "nonsense", "v5e:3x3"])
def test_unknown_slices_are_refused_with_examples(name):
    with pytest.raises(UserError, match="v5e:2x4"):
        topology_mesh(name)
