import jax
import pytest
from jax.sharding import AxisType

from qvdjax.errors import UserError
from qvdjax.parallel import MESH_AXES, initialize_distributed, make_mesh, parse_mesh


def test_a_mesh_has_all_axes_in_order_and_leaves_propagation_to_the_compiler():
    mesh = make_mesh({"tensor": 4, "fsdp": 2})
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "context": 1, "tensor": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_one_axis_takes_the_remaining_devices():
    assert make_mesh({"data": 2, "fsdp": -1}).shape["fsdp"] == jax.device_count() // 2


def test_a_smaller_mesh_takes_the_first_devices():
    assert list(make_mesh({"tensor": 2}).devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3, "fsdp": 4}, "needs 12 devices"),
        ({"fsdp": -1, "data": 3}, "cannot fill in fsdp"),
        ({"model": 2}, "unknown mesh axis 'model'"),
        ({"data": 0}, "no size"),
        ({"data": -1, "fsdp": -1}, "more than one"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, words):
    with pytest.raises(UserError, match=words):
        make_mesh(sizes)


def test_parse_mesh():
    assert parse_mesh("data=2, fsdp=4") == {"data": 2, "fsdp": 4}
    assert parse_mesh("context=-1") == {"context": -1}


@pytest.mark.parametrize("text", ["", "data", "data=two", "data=2,data=4", "rows=2", "data=0"])
def test_parse_mesh_refuses(text):
    with pytest.raises(UserError):
        parse_mesh(text)


def test_a_run_on_one_host_is_host_zero_and_starts_nothing():
    assert initialize_distributed(requested=False) == 0
    assert not jax.distributed.is_initialized()
