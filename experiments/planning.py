"""`qvdjax plan`: compile one step of a named model for a TPU slice that is not here."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import models
import qvdjax
from experiments.bench.shapes import CONFIGS, LATENT_SIZES
from qvdjax import parallel
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.recipes import get

FLOAT_RECIPES = ("none", "bf16")
TEXT_TOKENS = 512  # Wan pads its text to this
TIMESTEPS = 1000.0


def plan(
    model: str,
    recipe: str,
    topology: str,
    *,
    batch: int = 1,
    mesh: Mapping[str, int] | str | None = None,
    step: Literal["sample", "train"] = "sample",
    size: str = "480p",
) -> dict:
    """Does one step fit a slice, and what do its chips exchange? Only compiles.

    Args:
        model: A named configuration ("wan2.1-t2v-14b", or "wan2.1-14b" for short), or a folder with a
            config.json.
        recipe: Quantization by name; "none" for bfloat16.
        topology: The slice, such as "v5e:2x4".
        batch: Videos in the global batch.
        mesh: Axis sizes, as a mapping or as "fsdp=2,context=4"; by default as many devices as divide the
            number of heads split the tokens (`context`), and the rest spreads weights and batch (`fsdp`).
        step: "sample", one forward pass of the model (guidance takes two); or "train", one step of flow
            matching with AdamW: float32 master weights, bfloat16 compute, blocks recomputed in the backward
            pass.
        size: Video size, "480p" or "720p", 81 frames.

    Returns:
        What `qvdjax.parallel.plan` reports, and `model`, `recipe`, `topology`, `mesh`, `batch`, `step`,
        `size`, `left_whole` (weights that this mesh cannot split as the rules ask).

    Raises:
        UserError: Unknown names, a mesh that does not fit, or a training step of a quantized model.
    """
    config = _config(model)
    if size not in LATENT_SIZES:
        raise UserError(f"unknown size {size!r}", remedy=f"choose from {', '.join(LATENT_SIZES)}")
    if step not in ("sample", "train"):
        raise UserError(f"unknown step {step!r}", remedy="choose sample or train")
    if batch < 1:
        raise UserError(f"a batch of {batch}", remedy="give at least 1")
    if step == "train" and recipe not in FLOAT_RECIPES:
        raise UserError(
            f"the training step of {recipe} cannot be planned yet: quantization-aware training is not there",
            remedy="plan its `--step sample`, or `--recipe none --step train` for the float model",
        )
    if recipe not in FLOAT_RECIPES:
        get(recipe)  # an unknown name is said before the slice is described
    described = _mesh(topology, parallel.parse_mesh(mesh) if isinstance(mesh, str) else mesh, config)
    dtype = jnp.float32 if step == "train" else jnp.bfloat16
    abstract_model = jax.eval_shape(lambda: _build(config, recipe, dtype))
    inputs = _inputs(config, size, batch, described)
    arguments = parallel.abstract(abstract_model, described)
    if step == "sample":
        report = parallel.plan(_sample_step, arguments, *inputs, mesh=described)
    else:
        optimizer_state = parallel.abstract(jax.eval_shape(_OPTIMIZER.init, abstract_model), described)
        report = parallel.plan(_train_step, arguments, optimizer_state, *inputs, mesh=described, donate=(0, 1))
    return {
        **report, "model": model, "recipe": recipe, "topology": topology, "mesh": dict(described.shape),
        "batch": batch, "step": step, "size": size,
        "left_whole": parallel.left_whole(abstract_model, described),
    }  # fmt: skip


def _config(model: str) -> dict:
    names = {**{name.replace("-t2v", ""): name for name in CONFIGS}, **{name: name for name in CONFIGS}}
    if model in names:
        return CONFIGS[names[model]]
    file = Path(model) / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"no model is called {model!r}, and there is no readable {file}",
            remedy=f"choose from {', '.join(CONFIGS)}, or give a model folder",
        ) from error


def _mesh(topology: str, sizes: Mapping[str, int] | None, config: dict) -> Mesh:
    if sizes is None:
        devices = parallel.topology_mesh(topology).devices.size
        sizes = {"context": math.gcd(devices, config["num_attention_heads"]), "fsdp": -1}
    return parallel.topology_mesh(topology, sizes)


def _build(config: dict, recipe: str, dtype) -> VideoModel:
    model = models.build(config, dtype=dtype)
    return model if recipe in FLOAT_RECIPES else qvdjax.quantize(model, recipe, execution="integer")


def _inputs(config: dict, size: str, batch: int, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Latents (batch, frames, height, width, channels), timestep (batch,), context (batch, tokens, dim)."""

    def rows(shape, dtype):
        spec, _ = parallel.partition_spec(shape[:1], ("batch",), mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    latents = rows((batch, *LATENT_SIZES[size], config.get("in_channels", 16)), jnp.float32)
    context = rows((batch, TEXT_TOKENS, config["text_dim"]), jnp.bfloat16)
    return latents, rows((batch,), jnp.float32), context


def _sample_step(model, latents, timestep, context):
    return model(latents, timestep, context)


_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.01))


def _train_step(model, optimizer_state, latents, timestep, context):
    """Flow matching: predict noise - clean at sigma = timestep / 1000. Returns model, state and loss."""
    sigma = (timestep / TIMESTEPS)[:, None, None, None, None]  # (batch, 1, 1, 1, 1)
    noise = jax.random.normal(jax.random.key(0), latents.shape, latents.dtype)

    def loss_of(model):
        prediction = _in_bfloat16(model)((1 - sigma) * latents + sigma * noise, timestep, context, remat=True)
        return jnp.mean((prediction.astype(jnp.float32) - (noise - latents)) ** 2)

    loss, gradient = jax.value_and_grad(loss_of)(model)
    updates, optimizer_state = _OPTIMIZER.update(gradient, optimizer_state, model)
    return optax.apply_updates(model, updates), optimizer_state, loss


def _in_bfloat16(model):
    """The model's copy for computing; what its loaders keep in float32 stays."""

    def one(variable):
        keep = variable.get_metadata().get("keep_float32", False)
        return variable if keep else variable.replace(variable.get_value().astype(jnp.bfloat16))

    return jax.tree.map(one, model, is_leaf=lambda node: isinstance(node, nnx.Variable))
