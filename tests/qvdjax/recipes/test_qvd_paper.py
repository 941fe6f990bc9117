"""QVD's source's own layers and grids: ranges of frames, eight bits at both ends, a searched scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from small_models import ConvThenLinear, OneBlock, unet_inputs

import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, layers_of
from qvdjax.ptq import SearchScale
from qvdjax.recipes import decide, get

ONE_LEVEL = {
    "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlockMotion"],
    "up_block_types": ["CrossAttnUpBlockMotion"],
}  # fmt: skip
FRAMES = 3


def relative_error(found, exact) -> float:
    """||found - exact||^2 / ||exact||^2."""
    return float(jnp.square(found - exact).sum() / jnp.square(exact).sum())


def schemes_of(model, recipe) -> dict:
    return {name: s for name, s in decide(model, recipe).schemes.items() if hasattr(s, "weight")}


def bits(scheme) -> tuple:
    return tuple(None if quantizer is None else quantizer.bits for quantizer in (scheme.weight, scheme.activation))


def test_the_source_quantizes_every_layer():
    schemes = schemes_of(models.abstract(small_models.UNET), get("qvd-paper-w4a6"))
    ends = {"conv_in": (8, 8), "conv_out": (8, None)}
    for name, scheme in schemes.items():
        wanted = (4, None) if name.endswith("time_emb_proj") else (4, 6)  # whose input has a grid of its own
        assert bits(scheme) == ends.get(name, wanted), name
        assert not scheme.weight.symmetric
    plain = schemes_of(models.abstract(small_models.UNET), get("qvd-w4a6"))
    floats = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert {name for name, scheme in plain.items() if not scheme.quantizes} == floats
    assert all(s.activation.granularity == "tensor" for s in plain.values() if s.activation)


@pytest.mark.parametrize("family", ["UNET", "UNET_3D", "UNET_SPATIO_TEMPORAL"])
def test_layers_that_see_frames_one_by_one(family):
    schemes = schemes_of(models.abstract(getattr(small_models, family)), get("qvd-paper-w8a8"))
    own = {name for name, s in schemes.items() if s.activation and s.activation.granularity == "frame"}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    inner = ".spatial_res_block" if family == "UNET_SPATIO_TEMPORAL" else ""
    assert {
        "conv_in", f"down_blocks.0.resnets.0{inner}.conv2", "down_blocks.0.downsamplers.0.conv", f"{block}.attn1.to_k",
        f"{block}.attn2.to_q", f"{block}.attn2.to_out.0", f"{block}.ff.net.2", "down_blocks.0.attentions.0.proj_in",
    } <= own  # fmt: skip
    # The text has no frames, the timestep neither, and temporal layers mix them.
    mixing = ("motion_modules", "temp_", "temporal_", "transformer_in", "attn2.to_k", "attn2.to_v", "time_", "add_")
    others = {name for name, s in schemes.items() if s.activation} - own
    assert all(any(part in name for part in mixing) for name in others), others
    assert not any(part in name for part in mixing for name in own)


def test_models_without_frames_in_their_layers_have_one_range():
    schemes = schemes_of(models.abstract(small_models.WAN), get("qvd-paper-w6a8"))
    assert {s.activation.granularity for s in schemes.values() if s.activation} == {"tensor"}
    assert schemes["patch_embedding"].weight.bits == schemes["proj_out"].weight.bits == 8


def batch(seed: int = 0, samples: int = 1, frames: int = FRAMES, timestep: float = 900.0) -> dict:
    """Latents that grow from frame to frame, whose channels lie apart and differ in width."""
    latents = jax.random.normal(jax.random.key(seed), (samples, frames, 3, 4, 5)) * jnp.array([1.0, 1, 1, 2, 9])
    latents = (latents + jnp.arange(5.0)) * jnp.arange(1.0, frames + 1)[:, None, None, None]
    return {"latents": latents, "timestep": jnp.full((samples,), timestep), "context": jnp.zeros((samples, 1, 1))}


def test_frames_have_their_ranges_from_the_search_to_the_product():
    recipe = get("qvd-w8a6", frame_ranges=True, temporal_features="float")
    batches = [batch(0), batch(1)]
    simulated, integer = (
        qvdjax.quantize(OneBlock(ConvThenLinear()), recipe, batches, execution=e) for e in ("simulate", "integer")
    )
    for _, _, layer in layers_of(simulated, QUANTIZED_LAYERS):
        scales = np.asarray(layer.input_scale[...])
        assert scales.shape == (FRAMES, 1)
        assert (np.diff(scales[:, 0]) > 0).all()  # frames grow
    rows = qvdjax.describe(simulated)
    assert all(f"each of {FRAMES} frames has a range of its own" in row["reason"] for row in rows)
    given = batch(2, samples=2)
    exact, found = OneBlock(ConvThenLinear())(**given), simulated(**given)
    np.testing.assert_allclose(integer(**given), found, rtol=1e-5, atol=1e-3)  # the same integers, float32 sums
    whole = qvdjax.quantize(
        OneBlock(ConvThenLinear()), get("qvd-w8a6", temporal_features="float"), batches, execution="simulate"
    )
    # The first frame is a third of the last.
    first = [relative_error(model(**given)[:, 0], exact[:, 0]) for model in (simulated, whole)]
    assert first[0] < 0.5 * first[1]


def test_another_number_of_frames_is_refused():
    recipe = get("qvd-w8a8", frame_ranges=True, temporal_features="float")
    with pytest.raises(UserError, match="of 3 frames and of 4"):
        qvdjax.quantize(OneBlock(ConvThenLinear()), recipe, [batch(), batch(frames=4)])
    model = qvdjax.quantize(OneBlock(ConvThenLinear()), recipe, [batch()])
    with pytest.raises(UserError, match="latents of 6 frames"):
        model(**batch(frames=6))


def test_a_searched_scale_loses_least_among_its_thresholds():
    """The linear layer, in float64."""
    model, given = OneBlock(ConvThenLinear()), batch()
    recipe = get("qvd-w8a4", scale_search=True, thresholds=7, skip=r"block\.conv", temporal_features="float")
    # Latents of a later step have no say.
    quantized = qvdjax.quantize(model, recipe, [given, batch(1, timestep=100.0)], execution="simulate")
    [(_, _, layer)] = layers_of(quantized, QUANTIZED_LAYERS)
    assert layer.scheme.transforms == ("shift", "smooth_scale")
    block = model.stacks[0].block
    x = np.asarray(block.conv(given["latents"][0]), np.float64).reshape(-1, 6)  # f h w c -> (f h w) c
    weight = np.asarray(block.linear.weight[...], np.float64)
    low, high = x.min(axis=0), x.max(axis=0)
    width, centred = (high - low) / 2, x - (high + low) / 2
    np.testing.assert_allclose(layer.transform.shift[...], (high + low) / 2, rtol=1e-4, atol=1e-4)

    def error(threshold):
        scale = np.maximum(1, width / threshold)
        step = 2 * threshold / 15
        rounded_input = np.clip(np.round(centred / scale / step), -8, 7) * step
        scaled = weight * scale
        steps = np.abs(scaled).max(axis=1, keepdims=True) / 127
        rounded_weight = np.round(scaled / steps) * steps
        return np.square(rounded_input @ rounded_weight.T - centred @ weight.T).sum(), scale

    errors, scales = zip(*(error(t) for t in np.linspace(width.max(), width.mean(), 7)), strict=True)
    best = int(np.argmin(errors))
    assert best > 0  # scaling pays, else this would say little
    np.testing.assert_allclose(layer.transform.smooth_scale[...], scales[best], rtol=1e-4)  # float32 widths


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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scale_search": True, "thresholds": 5}], ids=["paper", "scaled"])
def test_a_whole_unet_in_a_folder(options, tmp_path):
    model = small_models.unet(**ONE_LEVEL)
    batches = [{**unet_inputs(batch=1, seed=s), "timestep": jnp.full((1,), 999.0 - 500 * s)} for s in (0, 1)]
    made = qvdjax.quantize(model, get("qvd-paper-w6a8", **options), batches, execution="simulate")
    models.save(made, tmp_path / "out")
    predict = jax.jit(lambda model, inputs: model(**inputs))
    inputs = unet_inputs(batch=2, seed=5)
    found = predict(made, inputs)
    # 6 bits of weights hold about 1e-3 of a value's energy; the random network adds up some thirty layers of it.
    assert relative_error(found, predict(model, inputs)) < 0.1
    np.testing.assert_array_equal(predict(models.load(tmp_path / "out", execution="simulate"), inputs), found)
    # The same integers, added up in another order: float32 rounding, which flips a code here and there further on.
    assert relative_error(predict(models.load(tmp_path / "out", execution="integer"), inputs), found) < 1e-4
