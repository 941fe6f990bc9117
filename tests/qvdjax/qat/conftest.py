"""A small model of two stacked blocks and a head, and the schemes of its layers."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from qvdjax.nn import InputClip, LayerScheme, Linear, Stack, VideoModel, stacked
from qvdjax.numerics import Quantizer

WIDTH, HIDDEN = 6, 10


class Block(nnx.Module):
    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up = Linear(WIDTH, HIDDEN, role="feed_forward_in", axes=("mlp", "embed"), key=up)
        self.down = Linear(HIDDEN, WIDTH, role="feed_forward_out", axes=("embed", "mlp"), key=down)

    def __call__(self, x, conditioning):
        return x + self.down(jnp.sin(self.up(x)))


class Toy(VideoModel):
    def __init__(self, key):
        keys = jax.random.split(key)
        self.stacks = nnx.List([Stack(stacked(Block, 2, keys[0]), prefix="blocks", count=2)])
        self.proj_out = Linear(WIDTH, WIDTH, role="head", axes=(None, "embed"), key=keys[1])

    def embed(self, latents, timestep, context):
        return latents.reshape(latents.shape[0], -1, WIDTH), latents.shape  # b f h w c -> b (f h w) c

    def head(self, stream, conditioning):
        return self.proj_out(stream).reshape(conditioning)  # b (f h w) c -> b f h w c


def toy_inputs(batch=2):
    latents = jax.random.normal(jax.random.key(7), (batch, 1, 2, 2, WIDTH)) + 0.2
    return {"latents": latents, "timestep": jnp.linspace(110.0, 910.0, batch), "context": None}


def toy_schemes(symmetric=False, clip=None, bits=4):
    activation = Quantizer(bits, symmetric, "token", dynamic=True)
    names = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("up", "down")]
    scheme = LayerScheme(Quantizer(bits, symmetric), activation, reason="a test", input_clip=clip)
    return {**dict.fromkeys(names, scheme), "proj_out": dataclasses.replace(scheme, input_clip=InputClip())}


@pytest.fixture(scope="session")
def toy():
    """The float model."""
    return Toy(jax.random.key(0))


@pytest.fixture(scope="session")
def inputs_of():
    """inputs_of(batch) -> arguments of the model."""
    return toy_inputs


@pytest.fixture(scope="session")
def schemes_of():
    """schemes_of(symmetric, clip, bits) -> name in diffusers -> scheme."""
    return toy_schemes
