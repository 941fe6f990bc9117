"""What the TPU compiler makes of a quantized block at real sizes: compiled, never run."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import models
from experiments.bench.shapes import shape
from qvdjax import parallel
from qvdjax.parallel.program import Program
from qvdjax.ptq import apply_schemes
from qvdjax.recipes import decide, get


def compiled_block(name: str, recipe: str, topology: str, axes: dict) -> Program:
    """The optimized program of a model's first block on all tokens of a video."""
    one = shape(name)
    mesh = parallel.topology_mesh(topology, axes)

    def build():
        model = models.build({**one.config, "num_layers": 1}, dtype=jnp.bfloat16)
        return apply_schemes(model, decide(model, get(recipe)).schemes, execution="integer")

    model = jax.eval_shape(build)
    inputs = ((1, *one.latents), (1,), (1, one.text_tokens, one.parsed.text_dim))
    arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in inputs]
    stream, conditioning = jax.eval_shape(lambda m, *a: m.embed(*a), model, *arrays)
    block = parallel.abstract(jax.eval_shape(lambda m: m.stacks[0].layer(0), model), mesh)
    tokens = jax.ShapeDtypeStruct(stream.shape, stream.dtype, sharding=NamedSharding(mesh, P(None, "context")))
    rest = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())), conditioning
    )
    with jax.set_mesh(mesh):
        call = jax.jit(lambda block, *inputs: block(*inputs))
        return Program(call.lower(block, tokens, rest).compile().as_text())


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_a_w8a8_block_keeps_its_integers_in_the_chip():
    program = compiled_block("wan2.1-1.3b-480p", "rtn-w8a8", "v5e:2x2", {"context": 4})
    activation = 32760 // 4 * 1536  # of one chip: the smallest array of all its tokens
    # Scales are applied where the int32 sums are made: none of them is written.
    assert program.written("s32", activation) == []
    integer = [row for row in program.products() if row["result"] == "s32"]
    assert sum(row["count"] for row in integer) == 10  # four of each attention, two of the feed-forward
    assert {(row["left"], row["right"]) for row in integer} == {("s8", "s8")}
    # No sum of integers, nor any other, crosses chips: tokens and heads change places in bfloat16, and weights travel
    # as codes; the float32 beside them are scales.
    collectives = {(row["kind"], row["dtype"]): row["bytes"] for row in program.collectives()}
    assert collectives.keys() == {("all-to-all", "bf16"), ("all-gather", "s8"), ("all-gather", "f32")}
    assert collectives["all-gather", "f32"] < 0.01 * collectives["all-gather", "s8"]
    # Both attentions are kernels, and scores of neither are written: the text's would be the largest arrays of all.
    assert program.written("f32", 12 // 4 * 32760 * 512) == []
