"""Counting operations: against products written out, and for a Wan model against its formula."""

import jax
import jax.numpy as jnp
import pytest

import models
from experiments.evaluation.ceiling import count_operations, speed_ceiling

SHAPE = jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)


def count(function, *parameters):
    """Operations of function(parameters..., latents, timestep, context), all inputs (2, 5, 4)."""
    return count_operations(jax.tree_util.Partial(function, *parameters), SHAPE, SHAPE, SHAPE)


def test_kinds_of_products():
    def model(weight, kernel, latents, timestep, context):
        tokens = latents @ weight  # (2, 5, 6)
        scores = jnp.einsum("bqd,bkd->bqk", tokens, tokens)
        image = jnp.broadcast_to(latents.mean(), (1, 3, 8, 8))
        grid = jax.lax.conv_general_dilated(image, kernel, (2, 2), "VALID")
        return scores, grid, timestep, context

    operations = count(model, jnp.ones((4, 6)), jnp.ones((7, 3, 2, 2)))
    assert operations == {
        "linear": 2 * (2 * 5) * 4 * 6,
        "attention": 2 * 2 * 5 * 5 * 6,
        "convolution": 2 * (7 * 4 * 4) * (3 * 2 * 2),
    }


def test_a_product_without_batch_axes_can_be_attention():
    def model(weight, latents, timestep, context):
        one_head = lambda tokens: (tokens @ weight) @ (tokens @ weight).T  # noqa: E731
        return jax.lax.map(one_head, latents)

    assert count(model, jnp.ones((4, 4))) == {
        "linear": 2 * 2 * (2 * 5 * 4 * 4),
        "attention": 2 * 2 * 5 * 5 * 4,
    }


def test_scans_and_inner_functions_count_as_often_as_they_run():
    @jax.checkpoint
    def block(x, weight):
        return jax.jit(lambda a: a @ weight)(x), None

    def model(weights, latents, timestep, context):
        return jax.lax.scan(block, latents, weights)[0]

    assert count(model, jnp.ones((9, 4, 4))) == {"linear": 9 * 2 * (2 * 5) * 4 * 4}


def test_what_a_loop_carries_may_become_an_activation_late():
    # The carry starts as a parameter and takes the input in during the first round.
    def model(weight, latents, timestep, context):
        step = lambda carry, _: (carry @ carry.T + latents[0, :4, :4], None)  # noqa: E731
        return jax.lax.scan(step, weight, None, length=3)[0]

    assert count(model, jnp.ones((4, 4))) == {"attention": 3 * 2 * 4 * 4 * 4}


def test_wan_by_formula():
    width, layers, mlp, text, freq, channels = 64, 3, 96, 24, 32, 8
    config = {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": width // 2,
        "in_channels": channels, "out_channels": channels, "text_dim": text, "freq_dim": freq, "ffn_dim": mlp,
        "num_layers": layers,
    }  # fmt: skip
    frames, height, width_pixels, words = 3, 4, 6, 5
    operations = count_operations(
        models.abstract(config),
        jax.ShapeDtypeStruct((1, frames, height, width_pixels, channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, words, text), jnp.float32),
    )
    tokens = frames * (height // 2) * (width_pixels // 2)
    # Self-attention: four projections; cross-attention: query and output for tokens, key and value for words.
    block = tokens * (6 * width**2 + 2 * width * mlp) + words * 2 * width**2
    once = freq * width + width**2 + width * 6 * width  # the timestep's MLP and the modulation
    once += words * (text * width + width**2) + 2 * tokens * 4 * channels * width  # text, patches in and out
    assert operations["linear"] + operations["convolution"] == 2 * (layers * block + once)
    assert operations["attention"] == layers * 4 * tokens * (tokens + words) * width


def test_amdahl():
    ceiling = speed_ceiling({"linear": 60, "attention": 30, "convolution": 10})
    assert ceiling["linear_share"] == 0.6
    assert ceiling["ceiling"] == pytest.approx(1 / 0.4)
    assert ceiling["ceiling_int8"] == pytest.approx(1 / 0.7)
    assert speed_ceiling({"linear": 5, "attention": 0, "convolution": 0})["ceiling"] is None
