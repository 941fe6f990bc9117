"""A step of reconstruction of a UNet: what its first block reads and makes, on a mesh; nothing is compiled."""

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import UNET, unet_inputs

from experiments.planning.reconstruction import planned_reconstruction
from qvdjax.parallel import make_mesh
from qvdjax.recipes import get


@pytest.mark.parametrize("recipe", ["tfmq-dm-w4a8", "qvd-w4a8"])
def test_the_first_block_of_a_unet_is_planned(recipe):
    mesh = make_mesh({"data": 1})
    whole = NamedSharding(mesh, PartitionSpec())
    inputs = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for name, a in unet_inputs(batch=1).items()}
    chosen = get(recipe, **({"learn": True} if recipe.startswith("qvd") else {}))
    with jax.set_mesh(mesh):
        function, arguments, _, waiting = planned_reconstruction(UNET, chosen, mesh, inputs)
        state, *_ = jax.eval_shape(function, *arguments)
    examples = arguments[3]
    # One example of one video: the sample in, both resolutions out, the lower one first.
    assert [a.shape for a in examples.part] == [(1, 1, 3, 4, 6, 16)]
    assert [a.shape for a in examples.target] == [(1, 1, 3, 2, 3, 16), (1, 1, 3, 4, 6, 16)]
    assert [a.shape for a in examples.weights] == [a.shape[:-1] for a in examples.target]
    assert jax.tree.leaves(state)
    assert waiting > 0
