"""q-vdit: losses and starts as published, which tokens are a frame's, training, interruptions, folders."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from round_trip import check_round_trip
from small_models import (
    COGVIDEOX,
    COGVIDEOX_VARIANTS,
    HUNYUANVIDEO,
    UNET,
    WAN,
    cogvideox_inputs,
    hunyuanvideo_inputs,
    unet_inputs,
    wan,
    wan_inputs,
)

import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import LayerScheme, Linear, TokenEstimator
from qvdjax.numerics import Quantizer
from qvdjax.ptq import FitChannelScale, quantize_layer, reconstruct, set_execution, with_gains
from qvdjax.ptq.layers import quantized_arrays
from qvdjax.ptq.reconstruction import FinishedBlocks
from qvdjax.ptq.reconstruction.known import Known
from qvdjax.ptq.reconstruction.temporal import temporal_divergence
from qvdjax.ptq.reconstruction.token_estimation import first_gains
from qvdjax.ptq.reconstruction.training import prepared
from qvdjax.recipes import decide, get

run = jax.jit(lambda model, inputs: model(**inputs))
SHORT = {"iterations": 40, "rate": 0.003, "step_rate": 0.003}


def relative_error(candidate, reference) -> float:
    return float(jnp.square(candidate - reference).sum() / jnp.square(reference).sum())


def plain_divergence(candidate, reference, frames):
    """The paper's formulas, one pair of frames at a time, in float64."""
    total = 0.0
    for ours, theirs in zip(candidate, reference, strict=True):
        rows = []
        for x in (ours, theirs):
            cut = [part.ravel() for part in np.split(x, frames)]
            cosine = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in cut] for a in cut]
            rows.append(np.exp(cosine) / np.exp(cosine).sum(axis=1, keepdims=True))
        total += (rows[1] * np.log(rows[1] / rows[0])).sum()
    return total / len(candidate)


def test_the_loss_between_frames_is_the_published_one():
    random = np.random.default_rng(0)
    candidate, reference = random.standard_normal((2, 2, 12, 5))
    found = temporal_divergence(jnp.asarray(candidate, jnp.float32), jnp.asarray(reference, jnp.float32), 4)
    # A float32 sum of 32 terms of at most one.
    assert float(found) == pytest.approx(plain_divergence(candidate, reference, 4), abs=1e-5)
    assert float(found) > 1e-3
    # Frames are neighbouring tokens: order within a frame and one factor for all of it do not matter, other cuts do.
    swapped = reference.reshape(2, 4, 3, 5)[:, :, ::-1].reshape(2, 12, 5) * 7
    both = [jnp.asarray(a, jnp.float32) for a in (swapped, reference)]
    assert float(temporal_divergence(*both, 4)) == pytest.approx(0, abs=1e-5)
    assert float(temporal_divergence(*both, 3)) > 1e-4
    assert np.isfinite(jax.grad(lambda x: temporal_divergence(x, both[1], 4))(jnp.zeros_like(both[0]))).all()


def test_gains_start_by_the_formula():
    similarity, share = np.array([0.99, 0.9, 0.95]), np.array([0.2, 0.5, 0.3])
    eta = np.exp(1 - similarity) / np.exp(1 - similarity).sum()
    np.testing.assert_allclose(first_gains(jnp.asarray(similarity), jnp.asarray(share)), eta / share, rtol=1e-5)
    np.testing.assert_allclose(first_gains(jnp.full(4, 0.9), jnp.full(4, 0.25)), 1, rtol=1e-6)


@pytest.mark.parametrize(("config", "inputs", "wanted"), [
    (WAN, wan_inputs, {"blocks.0.attn1.to_q": (3, 0, 0), "blocks.1.attn2.to_q": (3, 0, 0),
                       "blocks.2.attn2.to_k": (None, 0, 0), "blocks.2.ffn.net.2": (3, 0, 0)}),
    ({**COGVIDEOX, **COGVIDEOX_VARIANTS["2b"]}, cogvideox_inputs,
     {"transformer_blocks.0.attn1.to_v": (3, 7, 0), "transformer_blocks.2.ff.net.2": (3, 7, 0)}),
    (HUNYUANVIDEO, hunyuanvideo_inputs,
     {"transformer_blocks.0.attn.to_q": (3, 0, 0), "transformer_blocks.1.attn.add_q_proj": (None, 0, 0),
      "single_transformer_blocks.0.attn.to_q": (3, 0, 7), "single_transformer_blocks.0.proj_mlp": (3, 0, 7)}),
])  # fmt: skip
def test_layers_that_see_the_video_have_gains(config, inputs, wanted):
    model = models.abstract(config)
    schemes = with_gains(model, decide(model, get("q-vdit-w4a6")).schemes, inputs())
    found = {name: schemes[name].estimator for name in wanted}
    assert found == {name: TokenEstimator(1, *layout) for name, layout in wanted.items()}


@pytest.fixture(scope="module")
def small():
    return wan(num_layers=2), [wan_inputs(batch=1, seed=seed) for seed in (1, 2)]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_blocks_come_nearer(small, tmp_path):
    model, batches = small
    recipe = get("q-vdit-w3a8", **SHORT)
    schemes = with_gains(model, decide(model, recipe).schemes, batches[0])
    arguments = (model, schemes, batches, recipe.reconstruction)
    whole = reconstruct(*arguments)
    assert all(0 < report.after < report.before for report in whole.blocks), whole.blocks
    found = whole.layers["blocks.1.attn1.to_q"]["estimator"]
    assert found["gain"].shape == (3,)
    assert np.ptp(found["gain"]) > 1e-3
    assert np.abs(found["up"]).max() > 1e-3
    assert "gain" not in whole.layers["blocks.1.attn2.to_k"]["estimator"]
    assert "condition_embedder.time_proj" not in whole.layers  # one vector a step: no estimate
    finished = FinishedBlocks.open(tmp_path / "blocks", {"model": "wan"})

    def killed(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(*arguments, finished=finished, progress=killed)
    again = reconstruct(*arguments, finished=finished)
    chex.assert_trees_all_close(again.layers, whole.layers, rtol=1e-6, atol=1e-7)  # as read back


@pytest.mark.slow
def test_all_blocks_together(small):
    """One unit, whose error is that of the stream behind the last block; every layer is found under its own name."""
    model, batches = small
    recipe = get("q-vdit-w3a8", scope="model", **{**SHORT, "iterations": 20})
    schemes = with_gains(model, decide(model, recipe).schemes, batches[0])
    whole = reconstruct(model, schemes, batches, recipe.reconstruction)
    (report,) = whole.blocks
    assert report.name == "model"
    assert 0 < report.after < report.before
    assert set(whole.layers) == {name for name, scheme in schemes.items() if getattr(scheme, "estimator", None)}
    ups = [np.asarray(found["estimator"]["up"]) for found in whole.layers.values()]
    assert all(np.abs(up).max() > 1e-4 for up in ups)
    # They start near one, where frames are equally loud and equally rounded, and move by some steps of 0.003.
    gains = np.stack([found["estimator"]["gain"] for found in whole.layers.values() if "gain" in found["estimator"]])
    assert len(gains) == 2 * 8
    np.testing.assert_allclose(gains, 1, atol=0.5)


@pytest.mark.slow
def test_what_is_learned_is_stored_loaded_executed_and_described(small, tmp_path):
    model, batches = small
    quantized = qvdjax.quantize(model, get("q-vdit-w3a8", **SHORT), batches, execution="integer")
    nearest = qvdjax.quantize(model, get("rtn-w3a8", weight_symmetric=False, activation_symmetric=False,
                                         weight_range="search"))  # fmt: skip
    exact = [run(model, inputs) for inputs in batches]
    error = lambda one: sum(relative_error(run(one, b), e) for b, e in zip(batches, exact, strict=True))  # noqa: E731
    assert error(quantized) < error(nearest)
    simulated = set_execution(nnx.clone(quantized), "simulate")
    # One in some thousand codes of inputs flips; as for every recipe.
    assert relative_error(run(simulated, batches[0]), run(quantized, batches[0])) < 1e-4
    loaded = check_round_trip(set_execution(quantized, qvdjax.best_execution()[0]), tmp_path)
    chex.assert_trees_all_equal(run(loaded, batches[0]), run(quantized, batches[0]))
    assert "estimator" in json.dumps(json.loads((tmp_path / "one" / "config.json").read_text()))
    row = {row["path"]: row for row in qvdjax.describe(loaded)}["blocks.1.ffn.net.2"]
    assert (row["online"]["estimate_rank"], row["online"]["estimate_frames"]) == (1, 3)
    assert row["online"]["estimate_bytes"] == 4 * (96 + 64 + 3)
    assert row["online"]["multiply_adds"] == 96 + 64 + 1
    longer = {**batches[0], "latents": jnp.concatenate([batches[0]["latents"]] * 2, axis=1)[:, :4]}
    assert jax.eval_shape(run, loaded, longer).shape[1] == 4  # 48 tokens in three parts
    odd = {**batches[0], "latents": batches[0]["latents"][:, :1, :2, :4]}
    with pytest.raises(UserError, match="do not divide into 3 frames"):
        jax.eval_shape(run, loaded, odd)


def test_training_starts_at_the_layer_without_an_estimate():
    layer = Linear(12, 5, role="query", axes=("heads", "embed"), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 12)) * jnp.linspace(0.1, 9, 12)
    fit, edges = FitChannelScale(0.5), (x.min(axis=(0, 1)), x.max(axis=(0, 1)))
    tokens = Quantizer(6, symmetric=False, granularity="token", dynamic=True)
    scheme = LayerScheme(Quantizer(3, symmetric=False), tokens, ("smooth_scale",), estimator=TokenEstimator(1, 3))
    plan = get("q-vdit-w3a6").reconstruction
    block = nnx.Dict({"layer": layer})
    student = prepared(block, {"layer": scheme}, fit, {"layer": Known(ranges=edges)}, plan)["layer"]
    plain = dataclasses.replace(scheme, estimator=None)
    nearest = quantize_layer(layer, plain, execution="simulate", fit=fit, input_range=edges)
    chex.assert_trees_all_close(student(x), nearest(x), rtol=1e-5, atol=1e-5)  # the same codes, float32 sums of 12
    # What is learned is what is deployed, whatever it is.
    for variable in (student.estimator.down, student.estimator.up, student.estimator.gain, student.operands.log_step):
        variable[...] = 0.3 * jax.random.normal(jax.random.key(2), variable[...].shape)
    arrays = quantized_arrays(layer.weight[...], scheme, name="layer", learned=student.learned())
    deployed = quantize_layer(layer, scheme, execution="integer", arrays=arrays)
    chex.assert_trees_all_close(student(x), deployed(x), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(deployed(x) - nearest(x)).max()) > 0.1


def test_options():
    recipe = get("q-vdit-w4a6", feed_forward_bits="8", gains="none", temporal="0", alpha="0.5")
    schemes = decide(models.abstract(WAN), recipe).schemes
    wide, narrow = schemes["blocks.0.ffn.net.2"], schemes["blocks.0.attn1.to_q"]
    assert (wide.weight.bits, wide.activation.bits, narrow.weight.bits, narrow.activation.bits) == (8, 8, 4, 6)
    assert (wide.weight.symmetric, wide.estimator, narrow.estimator) == (False, TokenEstimator(), TokenEstimator())
    assert (narrow.transforms, get("q-vdit-w4a6").transform) == (("smooth_scale",), None)
    assert not recipe.reconstruction.estimation.of_frames
    assert recipe.name == "q-vdit-w4a6"


@pytest.mark.parametrize(("options", "message"), [
    ({"gains": "twos"}, "gains start as formula or ones"),
    ({"temporal": "-1"}, "weigh at least 0"),
    ({"rank": "0"}, "at least 1"),
    ({"inputs": "mixed"}, "inputs are full_precision or propagated"),
    ({"rate": "0"}, "must be positive"),
    ({"scope": "layer"}, "scope is block or model"),
])  # fmt: skip
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        get("q-vdit-w4a8", **options)


def test_models_without_frames_of_tokens_are_refused():
    with pytest.raises(UserError, match="which tokens are a frame's; set gains to none"):
        with_gains(models.abstract(UNET), {}, unet_inputs())
    with pytest.raises(UserError, match="empty"):
        with_gains(models.abstract(WAN), {}, None)
