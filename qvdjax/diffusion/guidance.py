"""Classifier-free guidance (Ho and Salimans 2022)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qvdjax.errors import UserError


def guided(model: Callable, guidance_scale: float | jax.Array, *, doubled_batch: bool = False) -> Callable:
    """The model's velocity after guidance: unconditional + scale * (conditional - unconditional).

    Args:
        model: `model(latents, timestep, context, **conditions) -> velocity`.
        guidance_scale: 1 (as a Python number) means no guidance: the unconditional pass is left out. A traced
            scale always makes both passes.
        doubled_batch: Run both passes as one batch of twice the size: fewer, larger products and twice the
            activation memory. The default is two passes, as Wan and diffusers make them. A model whose
            activation ranges span the whole batch (static ones do not) sees other ranges in a doubled batch.

    Returns:
        `predict(latents, timestep, context, negative_context, **conditions) -> velocity`, with latents
        (batch, frames, height, width, channels), timestep (batch,) in 0..1000, contexts (batch, tokens, dim)
        and a velocity like the latents, float32 or wider. Raises `UserError` when guidance lacks a negative
        context.
    """
    unguided = isinstance(guidance_scale, int | float) and guidance_scale == 1

    def at_least_float32(velocity: jax.Array) -> jax.Array:
        return velocity.astype(jnp.promote_types(velocity.dtype, jnp.float32))

    def predict(latents, timestep, context, negative_context=None, **conditions):
        if unguided:
            return at_least_float32(model(latents, timestep, context, **conditions))
        if negative_context is None:
            raise UserError(
                f"guidance scale {guidance_scale} needs a negative context",
                remedy="pass one (zeros, or the encoding of a negative prompt), or a guidance scale of 1",
            )
        if doubled_batch:
            twice = [jnp.concatenate([array, array]) for array in (latents, timestep)]  # b ... -> (2 b) ...
            contexts = jnp.concatenate([context, negative_context])  # b tokens dim -> (2 b) tokens dim
            conditions = jax.tree.map(lambda array: jnp.concatenate([array, array]), conditions)
            conditional, unconditional = jnp.split(model(*twice, contexts, **conditions), 2)
        else:
            conditional = model(latents, timestep, context, **conditions)
            unconditional = model(latents, timestep, negative_context, **conditions)
        conditional, unconditional = at_least_float32(conditional), at_least_float32(unconditional)
        scale = jnp.asarray(guidance_scale, conditional.dtype)
        return unconditional + scale * (conditional - unconditional)

    return predict
