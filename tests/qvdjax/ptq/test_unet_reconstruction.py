"""Blocks of UNets in reconstruction: streams of several arrays, convolutions, and layers of the timestep alone."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import ResnetUNet, randomised, unet, unet_inputs

import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear, QuantizedConv, QuantizedLinear, layers_of
from qvdjax.nn.low_rank import LowRank
from qvdjax.nn.protocol import block_at_timestep
from qvdjax.numerics import FeatureGrid, Quantizer, quantize
from qvdjax.ptq import quantize_layer, reconstruct
from qvdjax.ptq.feature_grids import temporal_features
from qvdjax.ptq.layers import quantized_arrays
from qvdjax.ptq.reconstruction import AdaptiveRounding, FinishedBlocks, Reconstruction, programs
from qvdjax.ptq.reconstruction.adaptive_rounding import hardened
from qvdjax.ptq.reconstruction.engine import _finished as finished_block
from qvdjax.ptq.reconstruction.examples import embedded, kept, without_blocks
from qvdjax.ptq.reconstruction.known import Known
from qvdjax.ptq.reconstruction.temporal_layers import TEMPORAL, temporal_layers
from qvdjax.ptq.reconstruction.training import prepared_layer, train
from qvdjax.recipes import decide, get

ROUNDING = Reconstruction(rounding=AdaptiveRounding(), unit="change", selection=None, token_weights=None)
STATIC = {"granularity": "tensor", "dynamic": False}


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def conv(stride: int = 1, parts=None) -> Conv:
    layer = Conv(
        5, 4, (3, 3), stride=(stride, stride), padding=((1, 1), (1, 1)), role="convolution", axes=("mlp", "embed"),
        frame_axis=0, parts=parts, key=jax.random.key(1),
    )  # fmt: skip
    layer.bias[...] = drawn(2, 4)
    return layer


def linear() -> Linear:
    layer = Linear(5, 4, role="query", axes=("heads", "embed"), frame_axis=1, key=jax.random.key(3))
    layer.bias[...] = drawn(4, 4)
    return layer


SHIFT = {"shift": np.array([0.5, -1, 2, 0, 3], np.float32), "smooth_scale": np.array([1, 2, 0.5, 1, 4], np.float32)}
EDGES = (np.array([-2.0], np.float32), np.array([3.0], np.float32))
FRAMES = (np.array([-1.0, -2, -3], np.float32), np.array([2.0, 3, 4], np.float32))
STEPS = (np.array([-1.0, -3], np.float32), np.array([2.0, 4], np.float32))
CASES = {
    "weights alone": (LayerScheme(Quantizer(3, False)), Known()),
    "dynamic": (LayerScheme(Quantizer(4), Quantizer(6, granularity="tensor", dynamic=True)), Known()),
    "static": (LayerScheme(Quantizer(4), Quantizer(6, False, **STATIC)), Known(edges=EDGES)),
    "of channels' ranges": (
        LayerScheme(Quantizer(4), Quantizer(6, False, **STATIC)), Known(ranges=(np.full(5, -2.0), np.arange(5.0))),
    ),
    "of frames": (
        LayerScheme(Quantizer(4), Quantizer(6, False, "frame", frames=3)), Known(edges=FRAMES),
    ),
    "of timesteps": (
        LayerScheme(Quantizer(4), Quantizer(6, False, "step", timesteps=(100.0, 900.0))), Known(edges=STEPS),
    ),
    "shifted": (
        LayerScheme(Quantizer(4), Quantizer(6, False, **STATIC), ("shift", "smooth_scale")),
        Known(edges=EDGES, fitted=SHIFT),
    ),
}  # fmt: skip


def test_roundings_of_what_a_low_rank_branch_leaves_are_refused():
    scheme = LayerScheme(Quantizer(4), Quantizer(6, False, **STATIC), low_rank=LowRank(2))
    with pytest.raises(ValueError, match="low-rank branch"):
        prepared_layer(linear(), scheme, None, Known(edges=EDGES), ROUNDING)


@pytest.mark.parametrize("kind", ["convolution", "strided", "linear"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_at_the_end_of_its_training_is_the_quantized_layer(kind, case):
    """Whatever its input is rounded by; codes are those of a training that turned some the other way."""
    scheme, known = CASES[case]
    layer = linear() if kind == "linear" else conv(2 if kind == "strided" else 1)
    # Two videos of three frames, at the two timesteps.
    x = drawn(0, 2, 3 * 8, 5) if kind == "linear" else drawn(0, 6, 4, 6, 5)
    student = prepared_layer(layer, scheme, None, known, ROUNDING)
    logits = student.operands.logits
    logits[...] = logits[...] + 2 * drawn(5, *logits[...].shape)
    student = hardened(student)
    positions = math.prod(getattr(layer, "kernel", ()))
    weight = layer.weight[...].reshape(4, -1)
    arrays = quantized_arrays(
        weight, scheme, name=kind, learned=student.learned(), edges=known.edges, input_range=known.ranges,
        positions=positions,
    )  # fmt: skip
    quantized = quantize_layer(layer, scheme, execution="simulate", arrays=arrays)
    timestep = jnp.array([850.0, 120.0])
    found, wanted = (block_at_timestep(nnx.List([one]), timestep)[0](x) for one in (student, quantized))
    # The same codes; float32 sums of at most 45 products.
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.dtype == wanted.dtype


@pytest.mark.parametrize("activation", [None, Quantizer(6, False, **STATIC)])
@pytest.mark.parametrize("weight", [Quantizer(3), Quantizer(4, False, range_method="search")])
def test_parts_of_a_convolution_keep_ranges_of_their_own(weight, activation):
    parts = (3, 2)
    layer, x = conv(parts=parts), drawn(0, 2, 4, 6, 5) * jnp.array([1, 1, 1, 0.05, 0.05])
    layer.weight[...] = layer.weight[...].at[:, 3:].multiply(20)
    scheme = LayerScheme(weight, activation, split=parts)
    edges = (np.array([-2.0, -0.1], np.float32), np.array([3.0, 0.2], np.float32))
    student = prepared_layer(layer, scheme, None, Known(edges=edges), ROUNDING)
    assert student.operands.scale[...].shape == (4, 2)
    flat = layer.weight[...].reshape(4, -1)
    # Nothing is rounded at first, but what lies beyond a narrowed range: float32 through a sigmoid, of some 10 steps.
    _, start = student.operands(x, flat)
    steps = np.repeat(student.operands.scale[...], [27, 18], axis=1)
    zero = 0 if student.operands.zero_point is None else np.repeat(student.operands.zero_point[...], [27, 18], axis=1)
    place = np.asarray(flat) / steps + zero
    inside = (place > weight.grid.low) & (place < weight.grid.high)
    assert inside.mean() > 0.8
    assert float(np.abs((start - flat) / steps)[inside].max()) < 1e-4
    nearest = quantize_layer(layer, scheme, execution="simulate", edges=edges)
    codes = np.asarray(hardened(student).learned()["weight"].codes, np.int32)
    # Undecided halves may go either way; nothing else differs.
    assert (np.abs(codes - np.asarray(nearest.codes[...], np.int32)) > 0).mean() < 0.02
    student.operands.logits[...] = student.operands.logits[...] + drawn(5, *codes.shape)
    student = hardened(student)
    arrays = quantized_arrays(flat, scheme, name="conv", learned=student.learned(), edges=edges, positions=9)
    quantized = quantize_layer(layer, scheme, execution="simulate", arrays=arrays)
    chex.assert_trees_all_close(student(x), quantized(x), rtol=1e-5, atol=1e-5)
    assert float(quantized.weight_sqnr_db[...]) < float(nearest.weight_sqnr_db[...])  # other codes are further


def test_a_temporal_feature_is_rounded_to_its_grid():
    features, layer = drawn(0, 4, 5), linear()
    grid = FeatureGrid("log", 4)
    levels = grid.fit(features)
    scheme = LayerScheme(Quantizer(4), feature_grid=grid)
    student = hardened(prepared_layer(layer, scheme, None, Known(levels=levels), ROUNDING))
    arrays = quantized_arrays(layer.weight[...], scheme, name="layer", learned=student.learned())
    quantized = quantize_layer(layer, scheme, execution="simulate", arrays=arrays)
    quantized.input_levels[...], quantized.input_edges[...] = levels
    chex.assert_trees_all_close(student(features), quantized(features), rtol=1e-5, atol=1e-6)


BLOCKS = ["down_blocks.0", "up_blocks.0.0", "up_blocks.0.1"]
QUICK = {"iterations": 60, "rate": 0.05}


def batches_of(make, seeds) -> list[dict]:
    """Inputs of one video each, at two timesteps in turn."""
    return [{**make(batch=1, seed=s), "timestep": jnp.full((1,), 999.0 - 500 * (s % 2))} for s in seeds]


@pytest.fixture(scope="module")
def small():
    """The UNet, what it is calibrated on, and other inputs."""
    return randomised(ResnetUNet()), batches_of(unet_inputs, range(6)), batches_of(unet_inputs, (6, 7))


def arguments(model, recipe, batches):
    return model, decide(model, recipe).schemes, batches, recipe.reconstruction


def test_a_skip_connection_that_is_the_sample_is_kept_once(small):
    model, batches, _ = small
    outer = without_blocks(model)
    stream = kept([embedded(outer, _stacked(batches))] * 2)[0]
    assert stream.skips[0] is stream.sample
    wanted = outer.embed(**batches[1])[0]
    # A program over all examples and one over one: float32 rounding.
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[1], stream), wanted, rtol=1e-5, atol=1e-5)


def _stacked(batches):
    return {name: np.stack([np.asarray(one[name]) for one in batches]) for name in batches[0]}


def test_blocks_of_equal_shape_share_a_program_and_a_killed_run_goes_on(small, tmp_path):
    model, batches, _ = small
    recipe = get("adaround-w3a8", **{**QUICK, "iterations": 6})
    before = train._cache_size()
    whole = reconstruct(*arguments(model, recipe, batches))
    # The temporal layers, and two shapes of blocks: those on the way up are alike but for their names.
    assert train._cache_size() == before + 3
    assert [report.name for report in whole.blocks] == ["temporal_features", *BLOCKS]
    schemes = decide(model, recipe).schemes
    inside = {name for names, path, _ in layers_of(model) if path[0] == "stacks" for name in names}
    assert set(whole.layers) == {n for n in inside if getattr(schemes[n], "weight", None) is not None}
    finished = FinishedBlocks.open(tmp_path / "blocks", {"model": "unet"})

    def killed(stage, done, total):
        assert total == len(BLOCKS)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(*arguments(model, recipe, batches), finished=finished, progress=killed)
    assert [report.name for report in finished.reports()] == ["temporal_features", *BLOCKS[:2]]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "blocks").glob("*.safetensors")}
    again = reconstruct(*arguments(model, recipe, batches), finished=finished)
    # What was read back is what was trained, and the last block meets the same skip connections.
    chex.assert_trees_all_equal(again.layers, whole.layers)
    assert times.items() <= {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "blocks").glob("*.safetensors")
    }.items()  # fmt: skip


def test_programs_of_one_kind_of_block_at_a_time_are_enough(small, monkeypatch):
    model, batches, _ = small
    recipe = get("adaround-w3a8", **{**QUICK, "iterations": 2})
    whole = reconstruct(*arguments(model, recipe, batches))
    monkeypatch.setattr(programs, "KEPT", 1)
    again = reconstruct(*arguments(model, recipe, batches))
    assert train._cache_size() == 1  # the last block's; the one before it shares it
    chex.assert_trees_all_equal(again.layers, whole.layers)


@pytest.mark.parametrize(("name", "options"), [
    ("adaround-w3a8", {}), ("q-diffusion-w3a8", {}),
    *(pytest.param(name, options, marks=pytest.mark.slow) for name, options in (
        ("tfmq-dm-w3a8", {}), ("tcaq-dm-w3a8", {}), ("qvd-w3a8", {"learn": True, "frame_ranges": True}),
    )),
])  # fmt: skip
def test_rounding_that_is_learned_loses_less_on_other_inputs(small, name, options):
    loses_less(*small, name, options)


@pytest.mark.slow
def test_an_animatediff_loses_less_on_other_inputs():
    one_level = {
        "block_out_channels": [16], "down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"],
    }  # fmt: skip
    loses_less(unet(**one_level), batches_of(unet_inputs, range(6)), batches_of(unet_inputs, (6, 7)), "adaround-w3a8")


def loses_less(model, batches, others, name: str, options: dict | None = None) -> None:
    options = options or {}
    recipe = get(name, **{**QUICK, **options})
    learned = qvdjax.quantize(model, recipe, batches, execution="simulate")
    nearest = qvdjax.quantize(model, get(name, **{**options, "learn": False}), batches, execution="simulate")
    shapes = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(learned) == shapes(nearest)  # nothing is left of what was trained
    run = jax.jit(lambda model, inputs: model(**inputs))
    exact = [run(model, one) for one in others]
    error = lambda made: sum(float(jnp.square(run(made, o) - e).sum()) for o, e in zip(others, exact))  # noqa: E731
    assert error(learned) < 0.9 * error(nearest)
    kinds = (QuantizedLinear, QuantizedConv)
    pairs = zip(layers_of(learned, kinds), layers_of(nearest, kinds), strict=True)
    for (names, path, layer), (_, _, twin) in pairs:
        apart = np.abs(np.asarray(layer.codes[...], np.int32) - np.asarray(twin.codes[...], np.int32))
        assert apart.max() <= 1, names
        assert apart.any() == (path[0] == "stacks"), names


def test_layers_of_the_timestep_are_trained_on_it_alone(small):
    model, batches, _ = small
    recipe = get("adaround-w3a16", iterations=300, rate=0.05)
    features = temporal_features(model, batches)
    assert {values.shape for values in features.values()} == {(2, 12)}  # two timesteps
    schemes, plan = decide(model, recipe).schemes, recipe.reconstruction
    unit = temporal_layers(model, schemes, features, None, {}, plan)
    assert len(unit.names) == 3  # of as many ResNets
    student, report = finished_block(unit.student, unit.outer, [unit.examples], plan, TEMPORAL, None)
    learned = unit.learned(student)
    layers = {names[0]: layer for names, _, layer in layers_of(model, (Linear,)) if names[0] in unit.names}
    total = {"learned": 0.0, "nearest": 0.0, "size": 0.0}
    for name, layer in layers.items():
        weight, x = layer.weight[...], jnp.asarray(features[name])
        codes = {"learned": learned[name]["weight"], "nearest": quantize(weight, schemes[name].weight)}
        for kind, rounded in codes.items():
            total[kind] += float(jnp.square(x @ (rounded.dequantize() - weight).T).mean())
        total["size"] += float(jnp.square(layer(x)).mean())
    # What is reported: all of the output is new, and all layers count alike.
    assert report.before == pytest.approx(total["nearest"] / total["size"], rel=1e-3)
    assert report.after == pytest.approx(total["learned"] / total["size"], rel=1e-3)
    # Two vectors and twelve weights an output: most of the error can be rounded away.
    assert report.after < 0.5 * report.before
    done = unit.done(schemes, learned, None)
    for name, layer in layers.items():
        rounded = jnp.asarray(features[name]) @ learned[name]["weight"].dequantize().T + layer.bias[...]
        chex.assert_trees_all_close(done[name].done(jnp.asarray(features[name])), rounded, rtol=1e-4, atol=1e-4)


def test_what_a_unet_cannot_be_trained_for_is_refused(small):
    model, batches, _ = small
    with pytest.raises(UserError, match="does not say which tokens are a frame's"):
        qvdjax.quantize(model, "q-vdit-w4a8", batches)
    with pytest.raises(UserError, match="nothing to reconstruct on"):
        qvdjax.quantize(model, "adaround-w4a8", [])
    shorter = {**batches[0], "latents": batches[0]["latents"][:, :2]}
    with pytest.raises(UserError, match="different shapes"):
        qvdjax.quantize(model, "adaround-w4a8", [batches[0], shorter])
    with pytest.raises(UserError, match="features are block or timestep"):
        get("adaround-w4a8", features="frames")
