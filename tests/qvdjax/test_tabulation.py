"""Tabulated models predict as the models they were made from, at the timesteps they were made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_models import cogvideox, cogvideox_inputs, wan, wan_inputs

import models
import qvdjax
from qvdjax.diffusion import DDIM, UniPCFlow, initial_noise, sample
from qvdjax.errors import UserError
from qvdjax.nn import InputClip, LayerScheme, TimestepTable, tables_of
from qvdjax.numerics import Quantizer
from qvdjax.parallel import make_mesh, place
from qvdjax.recipes import Recipe, Rule, get

run = jax.jit(lambda model, inputs: model(**inputs))
TIMESTEPS = UniPCFlow(3.0).schedule(4).timesteps
# Modulation layers that round their input too, narrowed by a clip that depends on the timestep.
CLIPPED = Recipe("clipped-w4a4", (
    Rule(LayerScheme(Quantizer(4), Quantizer(4, granularity="token", dynamic=True), input_clip=InputClip("bins", 50)),
         roles=("modulation", "time")),
))  # fmt: skip
CASES = {
    "wan": (wan, wan_inputs, None),
    "wan-w4a4": (wan, wan_inputs, get("rtn-w4a4")),
    "wan-clipped": (wan, wan_inputs, CLIPPED),
    "cogvideox": (cogvideox, cogvideox_inputs, None),
    # Cut into two stacks: the first block stays float.
    "cogvideox-w4a8": (cogvideox, cogvideox_inputs, get("rtn-w4a8", skip=r"transformer_blocks\.0\..*")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_at_its_timesteps_a_tabulated_model_predicts_as_before(case):
    make, make_inputs, recipe = case
    with jax.enable_x64(True):
        model = make(dtype=jnp.float64)
        if recipe is not None:
            model = qvdjax.quantize(model, recipe, execution="simulate")
        tabulated = qvdjax.tabulate(model, TIMESTEPS)
        # Two timesteps in one batch, float32 as the sampler gives them.
        inputs = {**make_inputs(dtype=jnp.float64), "timestep": jnp.asarray(TIMESTEPS[[3, 1]], jnp.float32)}
        before, after = run(model, inputs), run(tabulated, inputs)
    assert len(tables_of(tabulated)) >= 3
    assert not any(row["role"] in ("time", "modulation") and row["execution"] != "table" for row in
                   qvdjax.describe(tabulated))  # fmt: skip
    # Products over four rows instead of two sum in another order: some roundings of 1e-16 in each of three blocks.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12 * np.abs(before).max())


def test_another_timestep_is_nan_for_its_sample_alone():
    tabulated = qvdjax.tabulate(wan(), TIMESTEPS)
    inputs = {**wan_inputs(), "timestep": jnp.asarray([TIMESTEPS[0], 500.0], jnp.float32)}
    assert np.isnan(run(tabulated, inputs)).mean(axis=(1, 2, 3, 4)).tolist() == [0, 1]


def test_tokens_with_timesteps_of_their_own():
    model = wan()
    inputs = wan_inputs()
    tokens = 3 * 4 * 3  # patches of two rows and two columns
    timestep = jnp.full((2, tokens), TIMESTEPS[1], jnp.float32).at[:, :12].set(0)  # the first frame is a condition
    tabulated = qvdjax.tabulate(model, [*TIMESTEPS, 0.0])
    before, after = (run(m, {**inputs, "timestep": timestep}) for m in (model, tabulated))
    # The same float32 products over other batches.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_an_embedding_beside_the_timesteps_is_held_at_its_usual_value():
    """CogVideoX 1.5 image-to-video adds an `ofs` to the time embedding, which its pipeline never changes."""
    model, inputs = cogvideox("1.5-5b-i2v"), cogvideox_inputs("1.5-5b-i2v")
    tabulated = qvdjax.tabulate(model, inputs["timestep"])
    before, after = run(model, inputs), run(tabulated, inputs)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())  # float32, other batches
    with pytest.raises(UserError, match="ofs of 2"):
        tabulated(**inputs, ofs=jnp.array([3.0]))


def test_learned_positions_are_no_obstacle():
    tabulated = qvdjax.tabulate(cogvideox("5b-i2v"), TIMESTEPS)
    assert tables_of(tabulated)[0].table.shape[-2] == len(TIMESTEPS)


def test_what_is_described():
    model = qvdjax.quantize(cogvideox(), "rtn-w4a8")
    before = {row["path"]: row for row in qvdjax.describe(model)}
    after = {row["path"]: row for row in qvdjax.describe(qvdjax.tabulate(model, [*TIMESTEPS, TIMESTEPS[0]]))}
    assert before.keys() == after.keys()
    row = after["transformer_blocks.1.norm1.linear"]
    assert row["shape"] == [4, 384]  # a repeated timestep counts once; six vectors of 64 for video and text
    assert row["bytes"] == 4 * 4 * 384
    assert row["replaced_bytes"] == before[row["path"]]["bytes"] == 384 * 20 // 2 + 2 * 4 * 384  # codes, scales, biases
    assert row["float_bytes"] == before[row["path"]]["float_bytes"]
    assert (row["weight_bits"], row["activation_bits"], row["execution"]) == (32, None, "table")
    assert "4 steps" in row["reason"]
    assert after["transformer_blocks.1.attn1.to_q"] == before["transformer_blocks.1.attn1.to_q"]


@pytest.mark.parametrize(
    ("config", "parameters", "table_bytes"),
    [
        # DSAQuant counts 16.9 million and 1.08 MB: in bfloat16, without the first layer of the embedding.
        ({"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
         16_920_576, 50 * (2 * 1536 * 4 + 9216 * 2)),
        # DSAQuant counts 357.8 million and 69.5 MB: without the embedding of the timestep, which is not read.
        ({"_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 30, "num_layers": 30},
         357_801_728, 50 * (2 * 512 * 4 + (30 * 2 * 6 + 2) * 1920 * 2)),
    ],
)  # fmt: skip
def test_published_sizes(config, parameters, table_bytes):
    """Wan 2.1 1.3B and CogVideoX-2B in bfloat16 over fifty steps, as shapes; time embeddings are float32 islands."""
    timesteps = UniPCFlow(3.0).schedule(50).timesteps
    model = jax.eval_shape(lambda: qvdjax.tabulate(models.build(config, dtype=jnp.bfloat16), timesteps))
    tables = [row for row in qvdjax.describe(model) if row["execution"] == "table"]
    assert sum(row["replaced_bytes"] for row in tables) == 2 * parameters
    assert sum(row["bytes"] for row in tables) == table_bytes


def test_the_given_model_is_left_as_it_is():
    model = wan()
    before = jax.tree.structure(model)
    qvdjax.tabulate(model, TIMESTEPS)
    assert jax.tree.structure(model) == before


def test_only_the_layers_of_the_timestep_are_computed():
    """A model whose other weights are not numbers has good tables all the same."""
    model = wan()
    block = model.stacks[0].block
    for layer in (block.attn1.to_q, block.ffn.net["2"], model.condition_embedder.text_embedder["linear_1"]):
        layer.weight[...] = jnp.nan * layer.weight[...]
    for table in tables_of(qvdjax.tabulate(model, TIMESTEPS)):
        assert np.isfinite(table.table[...]).all()


def test_tables_lie_on_a_mesh_as_the_outputs_of_their_layers():
    model, inputs = cogvideox(), {**cogvideox_inputs(), "timestep": jnp.asarray(TIMESTEPS[[3, 1]], jnp.float32)}
    alone = run(qvdjax.tabulate(model, TIMESTEPS), inputs)
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    with jax.set_mesh(mesh):
        spread = place(qvdjax.tabulate(model, TIMESTEPS), mesh)
        table = spread.stacks[0].block.norm1.linear
        assert isinstance(table, TimestepTable)
        assert table.table[...].sharding.spec == P(None, None, "tensor")  # layers, steps, out
        together = run(spread, inputs)
    # Sums of products over four devices, in float32.
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize(
    ("make", "solver"), [pytest.param(wan, UniPCFlow(3.0), marks=pytest.mark.slow), (cogvideox, DDIM())]
)
def test_a_sampler_with_those_timesteps_makes_the_same_video(make, solver):
    model = qvdjax.quantize(make(), "rtn-w8a8")
    tabulated = qvdjax.tabulate(model, solver.schedule(3).timesteps, sampler="this one")
    context = jax.random.normal(jax.random.key(3), (2, 7, 24))
    arguments = {"noise": initial_noise([1, 2], (3, 8, 6, 5)), "solver": solver, "guidance_scale": 2.0}
    arguments["negative_context"] = jnp.zeros_like(context)
    before = sample(model, context, steps=3, **arguments).latents
    after = sample(tabulated, context, steps=3, **arguments).latents
    # Float32 modulation that differs in its last bit flips a code of 8 bits now and then; such a step is a 254th of a
    # token's range, in one of 64 summands. Over three steps that makes less than a hundredth of the whole.
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 1e-2
    with pytest.raises(UserError, match="3 timesteps of this one; this sampler visits others"):
        sample(tabulated, context, steps=4, **arguments)


def test_what_cannot_be_tabulated():
    model = wan()
    for timesteps in ([], [1000.5], [np.nan]):
        with pytest.raises(UserError, match="tables over the timesteps"):
            qvdjax.tabulate(model, timesteps)
    tabulated = qvdjax.tabulate(model, TIMESTEPS)
    with pytest.raises(UserError, match="tables over 4 steps.*tabulate the model it was made from"):
        qvdjax.tabulate(tabulated, TIMESTEPS)
    with pytest.raises(UserError, match="tables over 4 steps.*quantize the model it was made from"):
        qvdjax.quantize(tabulated, "rtn-w8a8")
