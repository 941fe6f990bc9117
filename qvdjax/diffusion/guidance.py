"""Classifier-free guidance (Ho and Salimans 2022)."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qvdjax.errors import UserError

DynamicGuidance = Literal["timestep", "step"]
NEGATIVE = "negative_"
"""A condition of this name before another's stands in for that one in the pass with the negative context."""


def guided(model: Callable, guidance_scale: float | jax.Array, *, doubled_batch: bool = False) -> Callable:
    """The model's prediction after guidance: unconditional + scale * (conditional - unconditional).

    Args:
        model: `model(latents, timestep, context, **conditions) -> prediction`.
        guidance_scale: 1 (as a Python number) means no guidance: the unconditional pass is left out. A traced
            scale always makes both passes. One number, or one a frame: (frames,).
        doubled_batch: Run both passes as one batch of twice the size: fewer, larger products and twice the
            activation memory. The default is two passes, as Wan and diffusers make them. A model whose
            activation ranges span the whole batch (static ones do not) sees other ranges in a doubled batch.

    Returns:
        `predict(latents, timestep, context, negative_context, **conditions) -> prediction`, with latents
        (batch, frames, height, width, channels), timestep (batch,), contexts (batch, tokens, dim) and a prediction
        like the latents, float32 or wider. The same conditions go into both passes; a condition
        `negative_<name>` takes the place of `<name>` in the one with the negative context. Raises `UserError` when
        guidance lacks a negative context.
    """
    unguided = isinstance(guidance_scale, int | float) and guidance_scale == 1

    def at_least_float32(prediction: jax.Array) -> jax.Array:
        return prediction.astype(jnp.promote_types(prediction.dtype, jnp.float32))

    def predict(latents, timestep, context, negative_context=None, **conditions):
        own, others = (of_branch(conditions, negative=negative) for negative in (False, True))
        if unguided:
            return at_least_float32(model(latents, timestep, context, **own))
        if negative_context is None:
            raise UserError(
                f"guidance scale {guidance_scale} needs a negative context",
                remedy="pass one (zeros, or the encoding of a negative prompt), or a guidance scale of 1",
            )
        if doubled_batch:
            twice = [jnp.concatenate([array, array]) for array in (latents, timestep)]  # b ... -> (2 b) ...
            contexts = jnp.concatenate([context, negative_context])  # b tokens dim -> (2 b) tokens dim
            both = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), own, others)
            conditional, unconditional = jnp.split(model(*twice, contexts, **both), 2)
        else:
            conditional = model(latents, timestep, context, **own)
            unconditional = model(latents, timestep, negative_context, **others)
        conditional, unconditional = at_least_float32(conditional), at_least_float32(unconditional)
        scale = jnp.asarray(guidance_scale, conditional.dtype)
        if scale.ndim == 1:
            scale = rearrange(scale, "f -> f 1 1 1")
        return unconditional + scale * (conditional - unconditional)

    return predict


def of_branch(conditions: Mapping[str, Any], *, negative: bool) -> dict[str, Any]:
    """The conditions of the pass with the negative context, or of the other one, by the model's names."""
    own = {name: array for name, array in conditions.items() if not name.startswith(NEGATIVE)}
    instead = {name.removeprefix(NEGATIVE): array for name, array in conditions.items() if name.startswith(NEGATIVE)}
    return own | instead if negative else own


def guided_steps(guidance_scale: float, timesteps: np.ndarray, until: float = 0.0) -> int:
    """How many steps, from the first, are guided: those whose timestep is at least `until`; none at a scale of 1.

    The later ones predict with the context alone and cost half. Guidance multiplies the difference of two predictions,
    and their errors with it, where little noise is left to correct them in; DSAQuant (arXiv 2609.04031) leaves it out
    below 0.4 of 1000, which is the last nine of fifty steps at a shift of 3.

    Args:
        guidance_scale: See `sample`.
        timesteps: Of the schedule, falling, (steps,).
        until: 0..1000; 0 are all steps, also where timesteps are negative.

    Raises `UserError` for a number out of that range.
    """
    if not 0 <= until <= 1000:
        raise UserError(f"guidance until timestep {until}", remedy="give a number from 0 (all steps) to 1000")
    if guidance_scale == 1:
        return 0
    return int(np.count_nonzero(np.asarray(timesteps) >= until)) if until else len(timesteps)


def guidance_scales(
    guidance_scale: float, timesteps: np.ndarray, dynamic: DynamicGuidance | None = None, *,
    first_frame: float | None = None, frames: int = 1,
) -> np.ndarray:  # fmt: skip
    """The guidance scale of every step, float64 (steps,), or of every step and frame, (steps, frames).

    Dynamic guidance is CogVideoX's: 1 + scale * (1 - cos(pi * progress^5)) / 2, so up to 1 + scale (formula:
    zai-org/CogVideo, sat/sgm/modules/diffusionmodules/guiders.py, `DynamicCFG`). What progress is, differs:

    - "timestep": (steps - timestep) / steps, what both published programs compute
      (sat/sgm/modules/diffusionmodules/sampling.py; diffusers' `use_dynamic_cfg`). With timesteps up to 999 and
      few steps it is far from 0..1, and the scale jumps up and down. The authors found that it helps
      (their issue 267).
    - "step": step / steps, which the formula's names suggest: a smooth rise from 1.

    Args:
        guidance_scale: A finite number.
        timesteps: Of the schedule, (steps,).
        dynamic: None for the same scale at every step.
        first_frame: The first frame's scale, from which it rises evenly to `guidance_scale` in the last, as Stable
            Video Diffusion's does (diffusers' `min_guidance_scale` and `max_guidance_scale`). None for the same scale
            in every frame.
        frames: Of the latents.

    Raises `UserError` for a scale that is not finite, an unknown kind, scales of both kinds, and for another first
    frame's scale where a scale of 1 means that there is no guidance.
    """
    for scale in (guidance_scale, 1.0 if first_frame is None else first_frame):
        if not math.isfinite(scale):
            raise UserError(f"the guidance scale is {scale}", remedy="give a finite number (1 means none)")
    steps = len(timesteps)
    if first_frame is not None:
        if dynamic is not None:
            raise UserError(
                "guidance is to vary over the frames and over the steps", remedy="leave one of the two options out"
            )
        if guidance_scale == 1 and first_frame != 1:
            raise UserError(
                f"a guidance scale of 1 is none, so the first frame's cannot be {first_frame:g}",
                remedy="give another guidance scale, the last frame's, or leave the first frame's out",
            )
        return np.tile(np.linspace(first_frame, guidance_scale, frames), (steps, 1))  # frames -> steps frames
    if dynamic is None:
        return np.full(steps, guidance_scale, np.float64)
    if dynamic not in get_args(DynamicGuidance):
        raise UserError(
            f"dynamic guidance of kind {dynamic!r}", remedy=f"choose one of {', '.join(get_args(DynamicGuidance))}"
        )
    progress = (steps - timesteps) / steps if dynamic == "timestep" else np.arange(steps) / steps
    return 1 + guidance_scale * (1 - np.cos(np.pi * progress**5)) / 2
