"""Recipes: names, options, rules and what they decide."""

import dataclasses

import jax
import numpy as np
import pytest
from small_models import WAN, ConvThenLinear, OneBlock, growing_latents, wan, wan_inputs

import models
import qvdjax
from qvdjax.calibration.ranges import input_ranges
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, AttentionScheme, LayerScheme, layers_of
from qvdjax.numerics import Quantizer
from qvdjax.recipes import METHODS, PRESET_BITS, Recipe, Rule, decide, get, names


def test_every_preset_is_there():
    assert {(8, 8), (6, 6), (4, 8), (4, 6), (4, 4), (3, 3)} == set(PRESET_BITS)
    assert {
        "rtn",
        "minmax",
        "smoothquant",
        "quarot",
        "gptq",
        "svdquant",
        "lsq",
        "q-dm",
        "efficientdm",
        "qvgen",
        "dsaquant",
    } <= set(METHODS)
    for name in names():
        assert get(name).name == name


def test_the_exceptions_of_every_preset():
    """Embedders, the timestep's MLP and the head stay float; modulation has float inputs; all else is quantized."""
    model = models.abstract(WAN)
    for name in names():
        recipe = get(name)
        decision = decide(model, recipe)
        if name.startswith(("qvgen-code", "dsaquant", "qvd-paper")):
            continue  # other layers, on purpose: below
        # Other grids, on purpose: zero points, groups of channels, refined ranges.
        others = {
            "qvgen-paper": {"symmetric": False},
            "q-dit": {"symmetric": False, "granularity": "group", "group_size": 128},
            "dvd-quant": {"symmetric": False, "range_method": "refine"},
            "q-vdit": {"symmetric": False, "range_method": "search"},
            "fp8": {"codebook": "float8_e4m3fn"},
            **dict.fromkeys(
                ("adaround", "mse", "ptq4dit", "ptq4dm", "q-diffusion", "tfmq-dm", "tdq", "tcaq-dm", "mpq-dm"),
                {"range_method": "search"},
            ),
        }
        weight = Quantizer(int(name.split("-w")[1].split("a")[0]), **others.get(name.rpartition("-")[0], {}))
        floats = {p for p, s in decision.schemes.items() if isinstance(s, LayerScheme) and not s.quantizes}
        assert floats == {
            "patch_embedding", "proj_out",
            *(f"condition_embedder.{kind}_embedder.linear_{i}" for kind in ("time", "text") for i in (1, 2)),
        }  # fmt: skip
        modulation = decision.schemes["condition_embedder.time_proj"]
        assert (modulation.weight, modulation.activation) == (weight, None)
        if name.rpartition("-")[0] in ("orbitquant", "best") and weight.bits < 8:
            weight = dataclasses.replace(weight, codebook="gaussian")
        products = [s for p, s in decision.schemes.items() if p.startswith("blocks") and isinstance(s, LayerScheme)]
        assert len(products) == 3 * 10
        rounded = not name.endswith("a16")
        assert all(s.weight == weight and (s.activation is not None) == rounded and s.reason for s in products)
        assert set(decision.absent_roles) == {"convolution", "projection", "temporal_feature"}


def test_layers_that_sources_choose_otherwise():
    model = models.abstract(WAN)
    code = decide(model, get("qvgen-code-w4a4")).schemes
    floats = {path for path, scheme in code.items() if isinstance(scheme, LayerScheme) and not scheme.quantizes}
    assert floats == {"patch_embedding"}
    assert code["condition_embedder.time_embedder.linear_1"] == code["blocks.0.attn1.to_q"] == code["proj_out"]
    assert code["proj_out"].input_clip.index == "residue"
    dsaquant = decide(model, get("dsaquant-w4a4")).schemes
    assert not dsaquant["condition_embedder.time_proj"].quantizes
    assert dsaquant["blocks.0.attn1.to_q"].weight == Quantizer(4)
    skipped = decide(model, get("dsaquant-w4a4", skip=r"blocks\.0\..*")).schemes
    assert not skipped["blocks.0.attn1.to_q"].quantizes


def test_the_first_matching_rule_decides():
    eight, four = LayerScheme(Quantizer(8), reason="first"), LayerScheme(Quantizer(4), reason="second")
    recipe = Recipe("mine-w4a16", (Rule(eight, path=r"blocks\.1\..*"), Rule(four, roles=("query",))))
    schemes = decide(models.abstract(WAN), recipe).schemes
    assert schemes["blocks.1.attn1.to_q"] == schemes["blocks.1.ffn.net.2"] == eight
    assert schemes["blocks.0.attn1.to_q"] == four
    assert schemes["blocks.0.attn1.to_k"].reason == "no rule of the recipe names it"


def test_blocks_that_differ_become_segments():
    model, inputs = wan(), wan_inputs()
    recipe = get("rtn-w4a8", skip=r"blocks\.(0|2)\..*")
    quantized = qvdjax.quantize(model, recipe)
    assert [(stack.start, stack.count) for stack in quantized.stacks] == [(0, 1), (1, 1), (2, 1)]
    kept = {row["path"] for row in qvdjax.describe(quantized) if row["weight_bits"] == 32}
    assert any(path.startswith("blocks.2.") for path in kept)
    assert not any(path.startswith("blocks.1.") for path in kept)
    assert jax.numpy.isfinite(jax.jit(lambda model: model(**inputs))(quantized)).all()


def test_a_path_that_matches_nothing_is_an_error_that_names_it():
    with pytest.raises(UserError, match="match no layer"):
        decide(models.abstract(WAN), get("rtn-w4a4", skip=r"blocks\.7\..*"))


def test_options_are_parsed_by_their_type():
    recipe = get("smoothquant-w4a6", alpha="0.7", group_size="16", weight_symmetric="false")
    assert recipe.transform.alpha == 0.7
    scheme = decide(models.abstract(WAN), recipe).schemes["blocks.0.attn1.to_q"]
    assert scheme.weight == Quantizer(4, False, "group", 16)
    assert scheme.transforms == ("smooth_scale",)
    assert get("rtn-w4a4", group_size="none") == get("rtn-w4a4")


def test_attention_products_are_an_option():
    decision = decide(models.abstract(WAN), get("rtn-w8a8", attention_qk_bits="8"))
    assert decision.schemes["blocks.0.attn1.attention"].qk_bits == 8
    plain = decide(models.abstract(WAN), get("rtn-w8a8")).schemes["blocks.0.attn1.attention"]
    assert isinstance(plain, AttentionScheme)
    assert plain.qk_bits is None
    for name, options in (("fp8-w8a8", {}), ("rtn-w8a8", {"attention_codebook": "float8_e4m3fn"})):
        recipe = get(name, attention_qk_bits=8, attention_pv_bits=8, **options)
        scheme = decide(models.abstract(WAN), recipe).schemes["blocks.0.attn1.attention"]
        assert (scheme.qk_bits, scheme.pv_bits, scheme.codebook) == (8, 8, "float8_e4m3fn")


@pytest.mark.parametrize(("name", "options", "message"), [
    ("magic-w4a4", {}, "unknown recipe"),
    ("rtn-w4", {}, "unknown recipe"),
    ("rtn-w1a4", {}, "out of range"),
    ("rtn-w4a9", {}, "out of range"),
    ("rtn-w4a4", {"wings": 2}, "no such option"),
    ("rtn-w4a4", {"attention_qk_bits": 4, "attention_codebook": "float8_e4m3fn"}, "float8_e4m3fn has 8 bits, not 4"),
    ("rtn-w4a4", {"attention_qk_bits": 8, "attention_codebook": "gaussian"}, "have no codebook 'gaussian'"),
    ("rtn-w4a4", {"group_size": "some"}, "group_size"),
    ("rtn-w4a4", {"weight_symmetric": "perhaps"}, "weight_symmetric"),
    ("rtn-w4a4", {"group_size": "-4"}, "positive"),
    ("rtn-w4a4", {"weight_range": "guess"}, "range_method"),
    ("rtn-w4a4", {"skip": "("}, "rtn-w4a4"),
    ("smoothquant-w4a4", {"alpha": "2"}, "alpha"),
])  # fmt: skip
def test_what_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        get(name, **options)


def test_only_calibrated_recipes_ask_for_calibration():
    assert [get(f"{m}-w8a8").needs_calibration for m in ("rtn", "minmax", "smoothquant")] == [False, True, True]
    assert not get("rtn-w4a16").needs_calibration


def test_sixteen_bit_activations_are_float():
    scheme = decide(models.abstract(WAN), get("rtn-w4a16")).schemes["blocks.0.attn1.to_q"]
    assert (scheme.weight.bits, scheme.activation) == (4, None)


def test_smoothquant_with_one_range_a_layer():
    """Which covers what calibration saw of the scaled channels; convolutions are not scaled."""
    model, batches = OneBlock(ConvThenLinear()), [growing_latents([900.0, 100.0])]
    quantized = qvdjax.quantize(model, get("smoothquant-w8a8", static=True), batches)
    ranges = input_ranges(model, batches)
    layers = {names[0]: layer for names, _, layer in layers_of(quantized, QUANTIZED_LAYERS)}
    scale = layers["block.linear"].transform.smooth_scale[...]
    for name, divided in (("block.conv", 1.0), ("block.linear", np.asarray(scale))):
        low, high = ranges[name]
        widest = np.maximum(-low, high) / divided
        np.testing.assert_allclose(layers[name].input_scale[...], [[widest.max() / 127]], rtol=1e-6)
    assert layers["block.conv"].transform is None
    with pytest.raises(UserError, match="one a layer"):
        get("smoothquant-w4a4", static=True, activation_group_size=8)
