"""QVD's source's own layers and grids on a small UNet: ranges of frames, eight bits at both ends, a searched scale."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from small_models import unet_inputs

import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, LayerScheme, layers_of
from qvdjax.ptq import RangeSearch, SearchScale, search_ranges
from qvdjax.recipes import decide, get

ONE_LEVEL = {
    "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlockMotion"],
    "up_block_types": ["CrossAttnUpBlockMotion"],
}  # fmt: skip
FRAMES = 3
predict = jax.jit(lambda model, inputs: model(**inputs))


def unet():
    """A video UNet of one level with random parameters."""
    return small_models.unet(**ONE_LEVEL)


def calibration() -> list[dict]:
    """Inputs at two timesteps, descending as a sampler has them."""
    return [{**unet_inputs(batch=1, seed=s), "timestep": jnp.full((1,), 999.0 - 500 * s)} for s in (0, 1)]


def relative_error(found, exact) -> float:
    """||found - exact||^2 / ||exact||^2."""
    return float(jnp.square(found - exact).sum() / jnp.square(exact).sum())


@pytest.fixture(scope="module")
def paper():
    """That UNet as the source has it, at W6A8."""
    return qvdjax.quantize(unet(), "qvd-paper-w6a8", calibration(), execution="simulate")


@pytest.fixture(scope="module")
def folder(paper, tmp_path_factory):
    """It, stored."""
    models.save(paper, tmp_path_factory.mktemp("qvd") / "out")
    return next(tmp_path_factory.getbasetemp().glob("qvd*/out"))


def test_what_every_layer_became(paper):
    rows = {row["path"]: row for row in qvdjax.describe(paper)}
    bits = {path: (row["weight_bits"], row["activation_bits"]) for path, row in rows.items()}
    assert bits["conv_in"] == (8, 8)
    assert bits["conv_out"] == (8, 32)
    assert bits["time_embedding.linear_1"] == bits["mid_block.resnets.0.conv1"] == (6, 8)
    assert min(weight for weight, _ in bits.values()) == 6
    assert max(weight for weight, _ in bits.values()) == 8
    assert all((row["activation_bits"] == 9) == (row["role"] == "temporal_feature") for row in rows.values()
               if row["path"] != "conv_out")  # fmt: skip
    own = {path for path, row in rows.items() if f"each of {FRAMES} frames has a range" in row["reason"]}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert {"conv_in", "down_blocks.0.resnets.0.conv2", f"{block}.attn1.to_k", f"{block}.attn2.to_q",
            f"{block}.ff.net.2", "down_blocks.0.attentions.0.proj_in"} <= own  # fmt: skip
    # The text has no frames, and temporal layers mix them.
    assert not any("motion_modules" in path or "attn2.to_k" in path or "time" in path for path in own)
    shapes = {
        names[0]: layer.input_scale[...].shape for names, _, layer in layers_of(paper, QUANTIZED_LAYERS)
        if layer.input_scale is not None
    }  # fmt: skip
    assert all(shape == ((FRAMES, 1) if name in own else (1, 1)) for name, shape in shapes.items())
    assert any(np.ptp(layer.input_scale[...]) > 0 for _, _, layer in layers_of(paper, QUANTIZED_LAYERS)
               if layer.input_scale is not None)  # fmt: skip


def test_a_folder_keeps_it_and_integers_compute_the_same(paper, folder):
    inputs = unet_inputs(batch=2, seed=5)
    found = predict(paper, inputs)
    # 6 bits of weights hold about 1e-3 of a value's energy; the random network adds up some thirty layers of it.
    assert relative_error(found, predict(unet(), inputs)) < 0.1
    np.testing.assert_array_equal(predict(models.load(folder, execution="simulate"), inputs), found)
    # The same integers, added up in another order: float32 rounding, which flips a code here and there further on.
    assert relative_error(predict(models.load(folder, execution="integer"), inputs), found) < 1e-4


def test_another_number_of_frames_is_refused(paper):
    inputs = unet_inputs(batch=1)
    longer = jnp.concatenate([inputs["latents"], inputs["latents"][:, :1]], axis=1)
    with pytest.raises(UserError, match="latents of 4 frames"):
        paper(**{**inputs, "latents": longer})
    batches = [*calibration(), {**calibration()[0], "latents": longer}]
    model = unet()
    unwatched = {name: LayerScheme() for names, _, _ in layers_of(model) for name in names}
    with pytest.raises(UserError, match="of 3 frames and of 4"):
        search_ranges(model, unwatched, batches, RangeSearch())


def test_models_without_frames_in_their_layers_have_one_range():
    schemes = decide(small_models.wan(), get("qvd-paper-w6a8")).schemes
    assert {s.activation.granularity for s in schemes.values() if getattr(s, "activation", None)} == {"tensor"}
    assert schemes["patch_embedding"].weight.bits == schemes["proj_out"].weight.bits == 8


def test_a_searched_scale_loses_least_among_its_thresholds():
    """One layer whose channels differ in width, in NumPy."""
    model = unet()
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    others = rf"(?!{name.replace('.', chr(92) + '.')}).*"
    recipe = get("qvd-w8a4", scale_search=True, thresholds=7, skip=others, temporal_features="float")
    quantized = qvdjax.quantize(model, recipe, calibration()[:1], execution="simulate")
    [(_, _, layer)] = [found for found in layers_of(quantized, QUANTIZED_LAYERS) if found[0] == [name]]
    assert layer.scheme.transforms == ("shift", "smooth_scale")
    seen = []
    float_layer = next(found[2] for found in layers_of(model) if found[0] == [name])

    def watched(layer, x, call=type(float_layer).__call__):
        if layer is float_layer:
            seen.append(x)
        return call(layer, x)

    with mock.patch.object(type(float_layer), "__call__", watched):
        model(**calibration()[0])
    x = np.asarray(seen[0], np.float64).reshape(-1, seen[0].shape[-1])  # b f p c -> (b f p) c
    weight = np.asarray(float_layer.weight[...], np.float64)
    low, high = x.min(axis=0), x.max(axis=0)
    width, centred = (high - low) / 2, x - (high + low) / 2
    np.testing.assert_allclose(layer.transform.shift[...], (high + low) / 2, atol=1e-5)

    def error(threshold):
        scale = np.maximum(1, width / threshold)
        step = 2 * threshold / 15
        codes = np.clip(np.round(centred / scale / step), -8, 7)
        scaled = weight * scale
        steps = np.abs(scaled).max(axis=1, keepdims=True) / 127
        rounded = np.round(scaled / steps) * steps
        return np.square(codes * step @ rounded.T - centred @ weight.T).sum(), scale

    thresholds = np.linspace(width.max(), width.mean(), 7)
    errors, scales = zip(*(error(t) for t in thresholds), strict=True)
    best = int(np.argmin(errors))
    assert best > 0  # scaling pays, else this would say little
    np.testing.assert_allclose(layer.transform.smooth_scale[...], scales[best], rtol=1e-4)  # float32 inputs and widths


def test_thresholds_fall_from_the_widest_channel_to_the_mean():
    search = SearchScale(5)
    width = jnp.array([1.0, 2, 6])
    np.testing.assert_allclose(search.thresholds(width), [6, 5.25, 4.5, 3.75, 3], rtol=1e-6)
    np.testing.assert_array_equal(search.scale_of(width, jnp.array(3.0)), [1, 1, 2])
    assert jnp.isfinite(search.scale_of(jnp.zeros(3), search.thresholds(jnp.zeros(3))[0])).all()


@pytest.mark.parametrize("option", [
    {"scale_search": True, "shift": False}, {"scale_search": True, "scale_alpha": 0.5}, {"ends_bits": 9},
    {"scale_search": True, "thresholds": 0},
])  # fmt: skip
def test_options_that_make_no_sense(option):
    with pytest.raises(UserError):
        get("qvd-w8a8", **option)
