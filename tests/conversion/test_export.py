"""Folders for other programs: the numbers that codes stand for, and codes as compressed-tensors packs them."""

import functools
import json
import os
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from small_models import WAN, wan_inputs
from small_models import wan as new_wan

import conversion
import models
from qvdjax import quantize
from qvdjax.checkpoint import CheckpointFolder, expected_tensors
from qvdjax.checkpoint.folder import WEIGHTS
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, InputClip, LayerScheme, TokenEstimator, layers_of
from qvdjax.numerics import Quantizer
from qvdjax.recipes import Recipe, Rule, get

wan = functools.cache(new_wan)  # quantizing leaves a model as it is
TOKENS = Quantizer(8, granularity="token", dynamic=True)
MIXED = Recipe("mixed-w4a8", (
    Rule(LayerScheme(Quantizer(4), Quantizer(8, granularity="tensor", dynamic=True)), path="patch_embedding"),
    Rule(LayerScheme(None, TOKENS), roles=("feed_forward_out",)),  # float weights, quantized inputs
    Rule(LayerScheme(Quantizer(4, symmetric=False, granularity="tensor"), TOKENS), roles=("query",)),
    Rule(LayerScheme(Quantizer(8, symmetric=False), TOKENS), roles=("key",)),
    Rule(LayerScheme(Quantizer(5, symmetric=False), TOKENS), roles=("value",)),
))  # fmt: skip
# What the recipes above leave out: eight bits in groups, and one range a tensor with and without zero points.
STRATEGIES = Recipe("strategies-w8a8", tuple(
    Rule(LayerScheme(Quantizer(bits, symmetric, granularity, size), TOKENS), roles=(role,))
    for role, bits, symmetric, granularity, size in (
        ("query", 8, False, "channel", None),
        ("key", 8, True, "tensor", None),
        ("value", 8, False, "tensor", None),
        ("attention_output", 8, False, "group", 16),
        ("feed_forward_in", 8, True, "group", 16),
        ("feed_forward_out", 4, True, "tensor", None),
        ("modulation", 3, False, "tensor", None),
    )
))  # fmt: skip
ASYMMETRIC = {"weight_symmetric": False, "group_size": 16}
RECIPES = {
    "w4a16": get("rtn-w4a16"),
    "w8a8": get("rtn-w8a8"),
    "w3a8, groups with zero points": get("rtn-w3a8", **ASYMMETRIC),
    "w6a6, static inputs with zero points": get("minmax-w6a6", activation_symmetric=False),
    "w4a4, smoothed": get("smoothquant-w4a4"),
    "w4a16, rotated": get("quarot-w4a16"),
    "w4a16, with branches": get("svdquant-w4a16", rank=4),
    "mixed": MIXED,
    "strategies": STRATEGIES,
}
CONFIG = models.parse_config(WAN).to_dict()
FLOAT = expected_tensors(models.abstract(WAN))
WITHOUT_TRANSFORMS = [name for name in RECIPES if not name.endswith(("smoothed", "rotated", "branches"))]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """quantized(name of a recipe above) -> (folder, its layers as `layers` gives them), made once each."""

    @functools.cache
    def make(name):
        recipe = RECIPES[name]
        model = quantize(wan(), recipe, [wan_inputs()] if recipe.needs_calibration else None)
        folder = tmp_path_factory.mktemp("quantized") / "model"
        models.save(model, folder, side_files={"pipeline.json": b"{}"})
        return folder, layers(model)

    return make


class Layer(NamedTuple):
    """A quantized layer of one block: its variables (None where it has none), and `real`, the weight [out, in] that
    its codes stand for by the layer's own arithmetic."""

    real: np.ndarray
    codes: np.ndarray | None
    zero_point: np.ndarray | None
    input_scale: np.ndarray | None
    input_zero_point: np.ndarray | None
    smooth_scale: np.ndarray | None


def layers(model):
    """Name in diffusers -> Layer, for every quantized layer and block."""
    found = {}
    for names, path, layer in layers_of(model, QUANTIZED_LAYERS):
        transform = getattr(layer, "transform", None)
        real = layer.weight if layer.codes is None else layer.qweight.dequantize()
        codes = None if layer.codes is None else np.asarray(layer.codes).astype(np.int8)
        zero_point = getattr(layer, "weight_zero_point", None)
        smooth_scale = None if transform is None else transform.smooth_scale
        parts = (real, codes, zero_point, layer.input_scale, layer.input_zero_point, smooth_scale)
        arrays = [None if part is None else np.asarray(part) for part in parts]
        for i, name in enumerate(names):
            row = i if path[0] == "stacks" else ...
            found[name] = Layer(*(None if array is None else array[row] for array in arrays))
    return found


def content(folder):
    folder = CheckpointFolder.open(folder)
    return {key: folder.read(key) for key in folder.keys}


def equal(one, other):
    """Whether two dictionaries hold the same arrays, bit for bit."""
    assert one.keys() == other.keys()
    return all(
        (one[k].dtype, one[k].shape, one[k].tobytes()) == (v.dtype, v.shape, v.tobytes()) for k, v in other.items()
    )


# --- floats


@pytest.mark.parametrize("name", [*WITHOUT_TRANSFORMS, "w4a4, smoothed"])
def test_dequantized_weights_are_what_the_codes_stand_for_bit_for_bit(tmp_path, quantized, name):
    folder, layers = quantized(name)
    report = conversion.export(folder, tmp_path / "plain", "diffusers")
    stored, plain = content(folder), content(tmp_path / "plain")
    wanted = {}
    for key, layer in layers.items():
        # Divided by the channel scale: the weight that meets the layer's own input instead of the divided one.
        weight = layer.real if layer.smooth_scale is None else layer.real / layer.smooth_scale
        wanted[f"{key}.weight"] = weight.reshape(FLOAT[f"{key}.weight"].shape)
    assert len(wanted) > 10
    assert equal(plain, {key: stored[key] for key in FLOAT if key not in wanted} | wanted)
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == CONFIG
    assert report["dequantized"] == sorted(layers)
    assert report["side_files"] == ["pipeline.json"]
    assert (tmp_path / "plain" / "pipeline.json").read_bytes() == b"{}"
    assert report["tensors"] == len(plain)
    assert report["bytes"] == sum(value.nbytes for value in plain.values())
    json.dumps(report)


@pytest.mark.parametrize("name", ["w4a16", "w4a16, rotated", "w4a16, with branches"])
def test_the_dequantized_model_computes_what_the_quantized_weights_do(tmp_path, quantized, name):
    folder, _ = quantized(name)  # inputs stay float, so the weights are all that was quantized
    conversion.export(folder, tmp_path / "plain", "diffusers")
    plain = models.load(tmp_path / "plain")
    assert not list(layers_of(plain, QUANTIZED_LAYERS))
    inputs = wan_inputs()
    before, after, full = (np.asarray(model(**inputs)) for model in (models.load(folder), plain, wan()))
    relative = lambda one, other: np.linalg.norm(one - other) / np.linalg.norm(other)  # noqa: E731
    # The same float32 products over the same numbers, compiled differently: rounding through three blocks.
    assert relative(after, before) < 1e-5
    assert relative(after, full) > 1e-2  # four bits are far from the full-precision weights


def test_a_wanted_type_leaves_the_float32_islands(tmp_path, quantized):
    folder, _ = quantized("w8a8")
    conversion.export(folder, tmp_path / "wide", "diffusers")
    conversion.export(folder, tmp_path / "narrow", "diffusers", dtype="bfloat16")
    wide, narrow = content(tmp_path / "wide"), content(tmp_path / "narrow")
    for key, value in wide.items():
        island = any(part in key for part in ("scale_shift_table", "time_embedder", ".norm2."))
        dtype = np.dtype(np.float32 if island else ml_dtypes.bfloat16)
        assert narrow[key].dtype == dtype, key
        assert narrow[key].tobytes() == value.astype(dtype).tobytes()


def test_a_plain_folder_is_copied(tmp_path):
    models.save(wan(), tmp_path / "source")
    report = conversion.export(tmp_path / "source", tmp_path / "target", "diffusers")
    assert equal(content(tmp_path / "target"), content(tmp_path / "source"))
    assert report["dequantized"] == report["attention_left_out"] == []


@pytest.mark.parametrize("name", ["w4a16", "w4a4, smoothed"])
def test_original_names_convert_back_to_the_same_tensors(tmp_path, quantized, name):
    folder, _ = quantized(name)
    conversion.export(folder, tmp_path / "plain", "diffusers")
    report = conversion.export(folder, tmp_path / "original", "wan-original")
    names = set(content(tmp_path / "original"))
    assert {"blocks.0.self_attn.q.weight", "head.modulation", "patch_embedding.bias"} <= names
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (config["dim"], config["num_heads"], config["num_layers"]) == (64, 2, 3)
    assert report["side_files"] == []
    back = conversion.convert(tmp_path / "original", tmp_path / "back")
    assert back["layout"] == "wan-original"
    assert equal(content(tmp_path / "back"), content(tmp_path / "plain"))
    # rope_max_seq_len, the size of a table, is not in the original config; all released models have 1024.
    assert models.parse_config(back["config"]).to_dict() == CONFIG | {"rope_max_seq_len": 1024}


def test_products_of_attention_that_are_left_out_are_reported(tmp_path):
    models.save(quantize(wan(), get("rtn-w8a8", attention_qk_bits=8)), tmp_path / "source")
    report = conversion.export(tmp_path / "source", tmp_path / "target", "diffusers")
    assert report["attention_left_out"] == [
        f"blocks.{i}.{part}.attention" for part in ("attn1", "attn2") for i in range(3)
    ]


# --- compressed-tensors


def slow_unpack(words, bits, count):
    """Codes of one bit stream, from the format's description: all 32-bit words are one long number, lowest word
    first; each code takes the next `bits` bits of it and lies 2**(bits - 1) too high."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    codes = [(stream >> (bits * k) & (2**bits - 1)) - 2 ** (bits - 1) for k in range(count)]
    assert stream >> (bits * count) == 0  # nothing after the last code
    return codes


def read_compressed(tensors, name, weights):
    """Codes [out, in], scale and zero point, each broadcastable to [out, groups], of one layer."""
    bits, scale = weights["num_bits"], tensors[f"{name}.weight_scale"]
    if bits == 8:
        codes = tensors[f"{name}.weight"]
        assert codes.dtype == np.int8
    else:
        packed, shape = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"]
        assert (packed.dtype, shape.dtype, shape.shape) == (np.int32, np.int64, (2,))
        codes = np.array([slow_unpack(row, bits, int(shape[1])) for row in packed])
        assert codes.shape == tuple(shape)
    zero_point = tensors.get(f"{name}.weight_zero_point")
    assert (zero_point is None) == weights["symmetric"]
    if weights["strategy"] == "tensor":
        assert scale.shape == (1,)
        assert zero_point is None or (zero_point.dtype, zero_point.shape) == (np.int8, (1,))
    else:
        size = weights["group_size"] or codes.shape[1]
        assert scale.shape == (len(codes), codes.shape[1] // size)
        if zero_point is not None and bits < 8:  # a stream a column, along the output axis
            assert zero_point.dtype == np.int32
            zero_point = np.array([slow_unpack(column, bits, len(codes)) for column in zero_point.T]).T
        assert zero_point is None or zero_point.shape == scale.shape
    return codes, np.atleast_2d(scale), None if zero_point is None else np.atleast_2d(zero_point).astype(np.float32)


def weight_args(config):
    """Layer -> its `weights` arguments."""
    groups = config["quantization_config"]["config_groups"].values()
    return {target: group["weights"] for group in groups for target in group["targets"]}


@pytest.mark.parametrize("name", WITHOUT_TRANSFORMS)
def test_an_independent_reader_recovers_codes_and_weights(tmp_path, quantized, name):
    folder, layers = quantized(name)
    report = conversion.export(folder, tmp_path / "packed", "compressed-tensors")
    tensors = content(tmp_path / "packed")
    arguments = weight_args(json.loads((tmp_path / "packed" / "config.json").read_text()))
    layers = {key: layer for key, layer in layers.items() if key != "patch_embedding"}  # a convolution
    assert arguments.keys() == layers.keys()
    for key, layer in layers.items():
        if layer.codes is None:
            assert arguments[key] is None
            np.testing.assert_array_equal(tensors[f"{key}.weight"], layer.real)
            continue
        codes, scale, zero_point = read_compressed(tensors, key, arguments[key])
        np.testing.assert_array_equal(codes, layer.codes)
        # [out, in] -> [out, groups, size]; in float32, as the layer computes
        grouped = codes.reshape(len(codes), scale.shape[-1], -1).astype(np.float32)
        real = (grouped if zero_point is None else grouped - zero_point[..., None]) * scale[..., None]
        np.testing.assert_array_equal(real.reshape(codes.shape), layer.real)
    assert report["rounded_zero_points"] == {"codes": 0.0, "weight": 0.0, "layer": None}
    json.dumps(report)


@pytest.mark.parametrize("name", WITHOUT_TRANSFORMS)
def test_the_library_itself_recovers_every_weight(tmp_path, quantized, name):
    """Last run with compressed-tensors 0.20.0; the tests with a reader of our own hold the same facts without it."""
    reason = "compressed-tensors is not installed (`pip install --no-deps compressed-tensors loguru frozendict`)"
    pytest.importorskip("compressed_tensors", reason=reason)
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder, layers = quantized(name)
    conversion.export(folder, tmp_path / "packed", "compressed-tensors")
    tensors = content(tmp_path / "packed")
    text = (tmp_path / "packed" / "config.json").read_text()
    config = QuantizationConfig.model_validate(json.loads(text)["quantization_config"])
    checked = set()
    for scheme in config.config_groups.values():
        for layer in scheme.targets:
            own = {k.removeprefix(f"{layer}."): v for k, v in tensors.items() if k.startswith(f"{layer}.weight")}
            own = {k: torch.from_numpy(np.array(v)) for k, v in own.items() if k != "weight_sqnr_db"}
            if scheme.weights is not None:
                compressor = BaseCompressor.get_value_from_registry(scheme.format)
                assert own.keys() == set(compressor.compression_param_names(scheme))
                own = compressor.decompress(own, scheme)
            np.testing.assert_array_equal(own["weight"].numpy(), layers[layer].real, err_msg=layer)
            checked.add(layer)
    assert checked == layers.keys() - {"patch_embedding"}  # a convolution


def test_everything_else_is_as_in_the_float_model(tmp_path, quantized):
    folder, layers = quantized("mixed")
    report = conversion.export(folder, tmp_path / "packed", "compressed-tensors")
    conversion.export(folder, tmp_path / "plain", "diffusers")
    packed, plain = content(tmp_path / "packed"), content(tmp_path / "plain")
    ours = {f"{name}.weight" for name in layers} - {"patch_embedding.weight"}
    assert equal({k: packed[k] for k in plain if k not in ours}, {k: v for k, v in plain.items() if k not in ours})
    # compressed-tensors knows no convolutions, so this one is float again.
    assert report["dequantized"] == ["patch_embedding"]
    assert packed["patch_embedding.weight"].shape == (64, 5, 1, 2, 2)


def test_static_ranges_of_inputs_come_along(tmp_path, quantized):
    folder, layers = quantized("w6a6, static inputs with zero points")
    conversion.export(folder, tmp_path / "packed", "compressed-tensors")
    tensors, static = content(tmp_path / "packed"), 0
    for name, layer in layers.items():
        if layer.input_scale is not None:
            scale, zero_point = (tensors[f"{name}.{part}"] for part in ("input_scale", "input_zero_point"))
            assert (scale.dtype, zero_point.dtype) == (np.float32, np.int8)
            np.testing.assert_array_equal(scale, layer.input_scale.reshape(1))
            np.testing.assert_array_equal(zero_point, layer.input_zero_point.reshape(1))
            static += 1
    assert static == 3 * 10  # blocks; four projections of each attention, two layers of the feed-forward


def test_the_configuration_says_what_every_linear_layer_is(tmp_path, quantized):
    folder, layers = quantized("w3a8, groups with zero points")
    conversion.export(folder, tmp_path / "packed", "compressed-tensors")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    args = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16, "dynamic": False}
    token = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True,
    }  # fmt: skip
    products = [name for name in layers if name != "condition_embedder.time_proj"]
    common = {"weights": args, "output_activations": None, "format": "pack-quantized"}
    quantization = config.pop("quantization_config")
    assert config == CONFIG
    groups = quantization.pop("config_groups").values()
    assert [group | {"targets": sorted(group["targets"])} for group in groups] == [
        {"targets": ["condition_embedder.time_proj"], "input_activations": None, **common},
        {"targets": sorted(products), "input_activations": token, **common},
    ]
    embedders = [f"{kind}_embedder.linear_{i}" for kind in ("time", "text") for i in (1, 2)]
    assert sorted(quantization.pop("ignore")) == sorted(["proj_out", *(f"condition_embedder.{e}" for e in embedders)])
    assert quantization == {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "stated"), [("w8a8", "int-quantized"), ("mixed", "mixed-precision")])
def test_the_format_of_each_group_is_named(tmp_path, quantized, name, stated):
    conversion.export(quantized(name)[0], tmp_path / "packed", "compressed-tensors")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["format"] == stated
    for group in config["config_groups"].values():
        bits = group["weights"] and group["weights"]["num_bits"]
        kinds = {None: "dense", 8: "int-quantized"}
        assert group["format"] == kinds.get(bits, "pack-quantized")


def test_fractional_zero_points_are_rounded_and_the_largest_change_reported(tmp_path):
    """Learned zero points need not be integers; two layers get such, and the larger change is told."""
    model = quantize(wan(), get("rtn-w4a8", **ASYMMETRIC))
    block = model.stacks[0].block
    for layer, shift in ((block.attn1.to_q, 0.25), (block.attn2.to_k, -0.375)):
        layer.weight_zero_point[...] = layer.weight_zero_point[...] + shift
    models.save(model, tmp_path / "source")
    report = conversion.export(tmp_path / "source", tmp_path / "packed", "compressed-tensors")
    tensors = content(tmp_path / "packed")
    arguments = weight_args(json.loads((tmp_path / "packed" / "config.json").read_text()))
    worst, changed = {}, {}
    for name, layer in layers(model).items():
        codes, scale, zero_point = read_compressed(tensors, name, arguments[name])
        change = np.abs(layer.zero_point - zero_point)
        assert change.max() <= 0.5 or zero_point.min() == -8 or zero_point.max() == 7  # nearest, or the grid's end
        changed[name] = change.max()
        real = (codes.reshape(*scale.shape, -1) - zero_point[..., None]) * scale[..., None]
        worst[name] = np.abs(real.reshape(codes.shape) - layer.real).max()
    rounded = report["rounded_zero_points"]
    assert {name for name, change in changed.items() if change} == {
        f"blocks.{i}.{name}" for i in range(3) for name in ("attn1.to_q", "attn2.to_k")
    }
    assert rounded["codes"] == max(changed.values()) == 0.375
    assert rounded["layer"] == max(worst, key=worst.get)
    # The test multiplies before it subtracts: two roundings of numbers of at most 16 scales.
    assert rounded["weight"] == pytest.approx(max(worst.values()), rel=1e-5)


# --- refusals: nothing may be left under the target's name


def refused(source, tmp_path, match, format="diffusers", **options):
    with pytest.raises(UserError, match=match) as error:
        conversion.export(source, tmp_path / "target", format, **options)
    assert not (tmp_path / "target").exists()
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
    return error.value


def test_smoothed_inputs_have_no_form_in_compressed_tensors(tmp_path, quantized):
    folder, _ = quantized("w4a4, smoothed")
    error = refused(folder, tmp_path, "transform their input", "compressed-tensors")
    assert len(error.items) == 3 * 10
    assert "blocks.0.attn1.to_q (smooth_scale)" in error.items
    assert error.remedy == "export to diffusers, or quantize with a recipe without transforms"


@pytest.mark.parametrize(
    ("name", "what"), [("w4a16, rotated", "rotation"), ("w4a16, with branches", "smooth_scale, low_rank")]
)
def test_rotations_and_branches_have_no_form_in_compressed_tensors(tmp_path, quantized, name, what):
    folder, _ = quantized(name)
    error = refused(folder, tmp_path, "have a branch", "compressed-tensors")
    assert f"blocks.0.ffn.net.2 ({what})" in error.items


@pytest.mark.parametrize("format", ["diffusers", "compressed-tensors"])
def test_gains_of_frames_have_no_form_elsewhere(tmp_path, format):
    estimated = LayerScheme(Quantizer(4), TOKENS, estimator=TokenEstimator(frames=3))
    recipe = Recipe("estimated-w4a8", (Rule(estimated, path=r"blocks\.0\.attn1\.to_q"),))
    models.save(quantize(wan(), recipe), tmp_path / "estimated")
    error = refused(tmp_path / "estimated", tmp_path, "no weight is one for all frames", format)
    assert error.items == ("blocks.0.attn1.to_q",)


def test_an_estimate_without_gains_goes_into_the_weight(tmp_path):
    """Of an input that is not rounded it is one more product with a weight of rank one."""
    estimated = LayerScheme(Quantizer(4), None, estimator=TokenEstimator())
    recipe = Recipe("estimated-w4a16", (Rule(estimated, path=r"blocks\.0\.attn1\.to_q"),))
    model = quantize(wan(), recipe)
    layer = model.stacks[0].block.attn1.to_q
    random = np.random.default_rng(0)
    for side in (layer.estimator.up, layer.estimator.down):
        side[...] = random.standard_normal(side[...].shape).astype(np.float32)
    wanted = layer.qweight.dequantize()[0] + np.asarray(layer.estimator.up)[0] @ np.asarray(layer.estimator.down)[0]
    models.save(model, tmp_path / "estimated")
    conversion.export(tmp_path / "estimated", tmp_path / "float", "diffusers")
    found = content(tmp_path / "float")["blocks.0.attn1.to_q.weight"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)  # the same float32 sum
    error = refused(tmp_path / "estimated", tmp_path, "an estimate", "compressed-tensors")
    assert error.items == ("blocks.0.attn1.to_q (estimator)",)


def test_clipped_ranges_have_no_form_in_compressed_tensors(tmp_path):
    clipped = LayerScheme(Quantizer(4), TOKENS, input_clip=InputClip())
    recipe = Recipe("clipped-w4a8", (Rule(clipped, path=r"blocks\.0\.attn1\.to_q"),))
    models.save(quantize(wan(), recipe), tmp_path / "clipped")
    error = refused(tmp_path / "clipped", tmp_path, "clip its range", "compressed-tensors")
    assert error.items == ("blocks.0.attn1.to_q (input_clip)",)


@pytest.mark.parametrize("format", ["diffusers", "compressed-tensors"])
def test_a_shift_has_no_form_elsewhere(tmp_path, format):
    batches = [{**wan_inputs(batch=1), "timestep": np.full(1, t, np.float32)} for t in (999.0, 500.0)]
    recipe = get("qvd-w8a8", skip=r"(?!blocks\.0\.attn1\.to_q$).*")  # one layer says it
    models.save(quantize(wan(), recipe, batches), tmp_path / "model")
    refused(tmp_path / "model", tmp_path, "shift", format)


def test_a_plain_folder_has_nothing_to_compress(tmp_path):
    models.save(wan(), tmp_path / "source")
    refused(tmp_path / "source", tmp_path, "is not quantized; quantize it first", "compressed-tensors")


def test_formats_types_and_sources_that_will_not_do_are_refused(tmp_path, quantized):
    folder, _ = quantized("w8a8")
    refused(folder, tmp_path, "unknown export format 'gguf'; use one of diffusers", "gguf")
    refused(folder, tmp_path, "no floating type", dtype="int4")
    refused(tmp_path / "none", tmp_path, "does not exist")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        conversion.export(folder, tmp_path / "target", "diffusers")
    assert os.listdir(tmp_path / "target") == ["mine"]
    conversion.export(folder, tmp_path / "target", "diffusers", overwrite=True)
    assert not (tmp_path / "target" / "mine").exists()


def test_weights_that_overflow_and_damaged_folders_are_refused(tmp_path):
    model = quantize(wan(), get("rtn-w8a8"))
    model.stacks[0].block.ffn.net["2"].weight_scale[...] *= 1e6
    models.save(model, tmp_path / "source")
    refused(tmp_path / "source", tmp_path, r"ffn\.net\.2\.weight overflows float16", dtype="float16")
    model.stacks[0].block.ffn.net["2"].weight_scale[...] *= np.inf
    models.save(model, tmp_path / "infinite")
    refused(tmp_path / "infinite", tmp_path, "NaN or infinite")
    whole = (tmp_path / "source" / WEIGHTS).read_bytes()
    (tmp_path / "source" / WEIGHTS).write_bytes(whole[:-1])
    refused(tmp_path / "source", tmp_path, "truncated")
