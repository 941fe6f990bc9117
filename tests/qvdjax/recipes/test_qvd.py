"""QVD on a small UNet: ranges are what was searched for, shifts what calibration saw, and a folder keeps all of it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from small_models import unet_inputs, wan, wan_inputs

import models
import qvdjax
from qvdjax.calibration import input_ranges
from qvdjax.calibration.steps import first_steps, timesteps_of
from qvdjax.nn import QUANTIZED_LAYERS, QuantizedConv, layers_of
from qvdjax.ptq import RangeSearch, search_ranges
from qvdjax.recipes import decide, get

# One level of resolution: every kind of layer but the convolution to the next level, in half the time to compile.
ONE_LEVEL = {
    "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlockMotion"],
    "up_block_types": ["CrossAttnUpBlockMotion"],
}  # fmt: skip
predict = jax.jit(lambda model, inputs: model(**inputs))


def unet():
    """A video UNet of one level with random parameters."""
    return small_models.unet(**ONE_LEVEL)


def calibration(inputs=unet_inputs, steps: int = 4) -> list[dict]:
    """Inputs at several timesteps, descending as a sampler has them."""
    batches = [inputs(batch=1, seed=seed) for seed in range(steps)]
    return [{**b, "timestep": jnp.full((1,), 999.0 - 240 * i)} for i, b in enumerate(batches)]


def relative_error(found, exact) -> float:
    """||found - exact||^2 / ||exact||^2."""
    return float(jnp.square(found - exact).sum() / jnp.square(exact).sum())


@pytest.fixture(scope="module")
def quantized():
    """That UNet at W8A8."""
    return qvdjax.quantize(unet(), "qvd-w8a8", calibration(), execution="simulate")


def test_nearly_the_full_precision_model(quantized):
    inputs = calibration()[1]
    error = relative_error(predict(quantized, inputs), predict(unet(), inputs))
    # 8 bits of a range hold about 1e-4 of a value's energy, and the random network adds up some thirty layers of it.
    assert error < 2e-2, error


def test_what_every_layer_became(quantized):
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    shifted = {path for path, row in rows.items() if row.get("online")}
    assert {row["role"] for path, row in rows.items() if path in shifted} == {
        "query", "key", "value", "attention_output", "feed_forward_in", "feed_forward_out", "projection", "convolution",
    }  # fmt: skip
    for path in shifted:
        row = rows[path]
        assert row["online"]["transforms"] == ["shift"]
        assert row["online"]["multiply_adds"] == row["shape"][1]  # one subtraction a channel
    features = [row for row in rows.values() if row["role"] == "temporal_feature"]
    assert features
    assert all(row["activation_bits"] == 8 and "grid" in row["reason"] for row in features)
    floats = {row["role"] for row in rows.values() if row["weight_bits"] >= 16}
    assert floats == {"embedder", "time", "head"}


def test_integer_and_simulated_execution_agree(quantized, tmp_path):
    inputs = calibration()[2]
    models.save(quantized, tmp_path / "out")
    integer = models.load(tmp_path / "out", execution="integer")
    # The same integers, added up in another order: float32 rounding, which flips a code here and there further on.
    assert relative_error(predict(integer, inputs), predict(quantized, inputs)) < 1e-4


def test_a_folder_keeps_all_of_it(quantized, tmp_path):
    models.save(quantized, tmp_path / "out")
    loaded = models.load(tmp_path / "out", execution="simulate")
    inputs = calibration()[0]
    chex.assert_trees_all_equal(predict(quantized, inputs), predict(loaded, inputs))
    assert [row["reason"] for row in qvdjax.describe(loaded)] == [row["reason"] for row in qvdjax.describe(quantized)]


def test_a_bfloat16_model_keeps_the_shift_in_its_bias(quantized, tmp_path):
    models.save(quantized, tmp_path / "out")
    loaded = models.load(tmp_path / "out", dtype=jnp.bfloat16)
    biases = {
        layer.bias.get_value().dtype
        for _, _, layer in layers_of(loaded, QUANTIZED_LAYERS) if "shift" in layer.scheme.transforms
    }  # fmt: skip
    assert biases == {np.dtype("float32")}


def test_statistics_of_the_first_step_are_of_the_first_step():
    batches = calibration()
    assert timesteps_of(batches) == [279.0, 519.0, 759.0, 999.0]
    [first] = first_steps(batches)
    chex.assert_trees_all_equal(first, jax.tree.map(np.asarray, batches[0]))
    one = {**unet_inputs(batch=3), "timestep": jnp.array([5.0, 7.0, 7.0])}
    [rows] = first_steps([one])
    assert rows["latents"].shape[0] == 2
    assert set(rows["timestep"]) == {7.0}


def shifts(model) -> dict[str, np.ndarray]:
    """Name -> shift, of the layers that have one."""
    return {
        names[0]: np.asarray(layer.transform.shift[...])
        for names, _, layer in layers_of(model, QUANTIZED_LAYERS) if "shift" in layer.scheme.transforms
    }  # fmt: skip


def test_shifts_are_the_middle_of_what_the_first_step_shows(quantized):
    ranges = input_ranges(unet(), calibration()[:1])
    for name, shift in shifts(quantized).items():
        np.testing.assert_array_equal(shift, np.float32((ranges[name][0] + ranges[name][1]) / 2), err_msg=name)


def test_query_key_and_value_of_one_input_share_their_shift(quantized):
    found = shifts(quantized)
    same = [name for name in found if name.endswith("attn1.to_q")]
    assert same
    for name in same:
        for other in ("to_k", "to_v"):
            np.testing.assert_array_equal(found[name], found[name.replace("to_q", other)])


@pytest.mark.parametrize(("make", "inputs"), [(unet, unet_inputs), (wan, wan_inputs)], ids=["unet", "stack"])
def test_shifts_of_timesteps_are_the_middle_of_what_each_step_shows(make, inputs, tmp_path):
    batches, recipe = calibration(inputs, steps=3), get("qvd-w8a8", statistics="step")
    model = qvdjax.quantize(make(), recipe, batches, execution="simulate")
    held = tuple(timesteps_of(batches))
    ranges = [input_ranges(make(), [batch]) for batch in reversed(batches)]  # by timestep, ascending
    layers = [(names, layer) for names, _, layer in layers_of(model, QUANTIZED_LAYERS) if layer.scheme.transforms]
    assert layers
    for names, layer in layers:
        assert layer.scheme.shift_timesteps == layer.transform.timesteps == held
        found = np.asarray(layer.transform.shift[...]).reshape(len(names), len(held), -1)  # [layers,] steps in
        for name, shift in zip(names, found, strict=True):
            middles = [(low + high) / 2 for low, high in (each[name] for each in ranges)]
            np.testing.assert_array_equal(shift, np.float32(middles), err_msg=name)
    reasons = [row["reason"] for row in qvdjax.describe(model) if row.get("online")]
    assert all("each of 3 timesteps has a shift of its own" in reason for reason in reasons)
    exact, found = (predict(one, batches[1]) for one in (make(), model))
    assert relative_error(found, exact) < 2e-2  # as with one shift, see above
    models.save(model, tmp_path / "out")
    loaded = models.load(tmp_path / "out", execution="simulate")
    chex.assert_trees_all_equal(predict(loaded, batches[1]), found)
    integer = models.load(tmp_path / "out", execution="integer")
    # The same integers, added up in another order: float32 rounding, which flips a code here and there further on.
    assert relative_error(predict(integer, batches[2]), predict(model, batches[2])) < 1e-4


@pytest.mark.slow
def test_roundings_are_learned_behind_shifts_of_timesteps():
    batches = calibration(steps=3)
    errors = []
    for learn in (False, True):
        recipe = get("qvd-w3a8", statistics="step", learn=learn, **({"iterations": 60} if learn else {}))
        model = qvdjax.quantize(unet(), recipe, batches, execution="simulate")
        errors.append(sum(relative_error(predict(model, batch), predict(unet(), batch)) for batch in batches))
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "transforms"),
    [
        ({"shift": False}, ()),
        ({"scale_alpha": 0.5}, ("shift", "smooth_scale")),
        ({"static_range": "shrink"}, ("shift",)),
        ({"statistics": "all"}, ("shift",)),
        ({"step_ranges": True}, ("shift",)),
        # best-unet, less its learned rounding
        ({"statistics": "all", "scale_alpha": 0.5, "step_ranges": True, "over_calls": "widest",
          "temporal_features": "step"}, ("shift", "smooth_scale")),
    ],
)  # fmt: skip
def test_options_change_what_they_say(option, transforms, quantized):
    inputs = calibration()[1]
    other = qvdjax.quantize(unet(), get("qvd-w8a8", **option), calibration(), execution="simulate")
    found = predict(other, inputs)
    assert relative_error(found, predict(unet(), inputs)) < 5e-2
    assert bool((found != predict(quantized, inputs)).any())
    assert {layer.scheme.transforms for _, _, layer in layers_of(other, (QuantizedConv,))} == {transforms}


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "log2", "log", "mixed", "signal", "step"])
def test_temporal_features_of_every_kind(kind):
    others = r".*\.(conv\d?|conv_shortcut|proj|proj_in|proj_out|to_[qkv]|0|2)"  # all layers but those of the timestep
    recipe = get("rtn-w8a8", temporal_features=kind, skip=others)
    model = qvdjax.quantize(unet(), recipe, calibration())
    rows = [row for row in qvdjax.describe(model) if row["role"] == "temporal_feature"]
    assert {row["activation_bits"] for row in rows} == {9 if kind == "log2" else 8}
    for _, _, layer in layers_of(model, QUANTIZED_LAYERS):
        x = jnp.linspace(-0.3, 2.0, layer.qweight.codes.shape[1])[None]
        exact = jnp.matmul(x, layer.qweight.dequantize().T) + layer.bias[...]
        # Codes of 4 bits' worth of octaves err by up to a third of a value, so this only says that nothing is amiss.
        assert relative_error(layer(x), exact) < 0.3


def test_mse_narrows_what_minmax_takes_whole():
    batches = calibration(wan_inputs, steps=2)
    wide, narrow = (qvdjax.quantize(wan(), f"{name}-w4a4", batches, execution="simulate") for name in ("minmax", "mse"))
    scales = [
        np.concatenate([np.ravel(layer.input_scale[...]) for _, _, layer in layers_of(model, QUANTIZED_LAYERS)
                        if layer.input_scale is not None])
        for model in (wide, narrow)
    ]  # fmt: skip
    assert (scales[1] <= scales[0] * (1 + 1e-6)).all()  # float32 means of equal numbers
    assert (scales[1] < 0.9 * scales[0]).any()


@pytest.mark.parametrize("over_calls", ["mean", "widest"])
def test_searched_ranges_are_of_all_calls(over_calls):
    model, recipe = wan(), get("minmax-w8a8")
    schemes, batches = decide(model, recipe).schemes, calibration(wan_inputs, steps=2)
    search = RangeSearch(over_calls=over_calls)
    calls = [search_ranges(model, schemes, [batch], search) for batch in batches]
    both = search_ranges(model, schemes, batches, search)
    assert set(both) == {name for name, scheme in schemes.items() if getattr(scheme, "activation", None) is not None}
    for name, edges in both.items():
        (low, high), (other_low, other_high) = calls[0][name], calls[1][name]
        if over_calls == "widest":
            np.testing.assert_array_equal(edges, (np.minimum(low, other_low), np.maximum(high, other_high)))
        else:  # float32 means of two numbers
            np.testing.assert_allclose(edges, ((low + other_low) / 2, (high + other_high) / 2), rtol=1e-6)


def test_a_model_without_temporal_features_takes_the_recipe():
    model = qvdjax.quantize(wan(), "qvd-w8a8", calibration(wan_inputs, steps=2))
    assert jnp.isfinite(model(**calibration(wan_inputs)[0])).all()


@pytest.mark.parametrize("option", [{"step_ranges": True}, {"over_calls": "widest"}])
def test_what_does_not_clip_the_widest(option):
    """Inputs ten times as large at one step as at the others: the mean of the calls clips there, its own range not."""
    batches = [{**batch, "latents": batch["latents"] * (10.0 if number == 0 else 1.0)}
               for number, batch in enumerate(calibration(wan_inputs, steps=3))]  # fmt: skip
    inputs = batches[0]
    exact = predict(wan(), inputs)
    errors = []
    for options in ({}, option):
        recipe = get("qvd-w8a8", statistics="all", **options)
        errors.append(relative_error(predict(qvdjax.quantize(wan(), recipe, batches), inputs), exact))
    assert errors[1] < 0.8 * errors[0]


def test_one_timestep_says_nothing_about_telling_them_apart():
    with pytest.raises(qvdjax.errors.UserError, match="at least two steps"):
        qvdjax.quantize(unet(), "qvd-w8a8", calibration(steps=1))


@pytest.mark.parametrize(
    "option", [{"statistics": "last"}, {"static_range": "widest"}, {"average_bits": 4.0}, {"temporal_features": "log3"},
               {"shift": False, "scale_alpha": 0.5}, {"frame_ranges": True, "step_ranges": True},
               {"over_calls": "last"}, {"statistics": "step", "shift": False},
               {"statistics": "step", "scale_search": True}]
)  # fmt: skip
def test_options_that_make_no_sense(option):
    with pytest.raises(qvdjax.errors.UserError):
        get("qvd-w8a8", **option)


def test_our_own_is_qvd_with_the_options_it_names():
    own = get("best-unet-w6a6", learn=False)
    options = {"statistics": "all", "scale_alpha": 0.5, "step_ranges": True, "over_calls": "widest"}
    same = get("qvd-w6a6", temporal_features="step", **options)
    assert own == dataclasses.replace(same, name=own.name)
    assert get("best-unet-w6a6").reconstruction is not None
