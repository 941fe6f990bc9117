"""One block of a model at a real size, compiled for a slice of TPUs and never run."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import models
from experiments.bench.shapes import shape
from qvdjax import parallel
from qvdjax.ptq import apply_schemes
from qvdjax.recipes import decide, get


def compiled_block(
    name: str, recipe: str | None, topology: str, axes: Mapping[str, int], **options
) -> jax.stages.Compiled:
    """The first block of a model on all tokens of a video, which `axes` may split.

    Args:
        name: Of a shape (`experiments.bench.shapes`), one that flattens its video into tokens.
        recipe: What quantizes it, for integer execution; None for bfloat16.
        topology: Such as "v5e:2x2".
        axes: Sizes of the mesh's axes.
        options: Of the recipe.
    """
    one = shape(name)
    mesh = parallel.topology_mesh(topology, axes)
    whole = PartitionSpec()

    def build():
        model = models.build({**one.config, "num_layers": 1}, dtype=jnp.bfloat16)
        if recipe is None:
            return model
        return apply_schemes(model, decide(model, get(recipe, **options)).schemes, execution="integer")

    def described(array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    model = jax.eval_shape(build)
    inputs = ((1, *one.latents), (1,), (1, one.text_tokens, one.parsed.text_dim))
    arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in inputs]
    stream, conditioning = jax.eval_shape(lambda m, *a: m.embed(*a), model, *arrays)
    block = parallel.abstract(jax.eval_shape(lambda m: m.stacks[0].layer(0), model), mesh)
    stream = described(stream, PartitionSpec(None, "context"))
    conditioning = jax.tree.map(lambda a: described(a, whole), conditioning)
    with jax.set_mesh(mesh):
        return jax.jit(lambda block, *a: block(*a)).lower(block, stream, conditioning).compile()
