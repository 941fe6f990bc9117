"""Scale and zero point of least squared error, refined in turns with the codes that they give."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qvdjax.numerics.grid import Grid

Parameters = tuple[jax.Array, jax.Array | None]
TURNS = 20


def refined(
    x: jax.Array, grid: Grid, scale: jax.Array, zero_point: jax.Array | None, total: Callable[[jax.Array], jax.Array]
) -> Parameters:
    """The best of the given parameters and `TURNS` refinements (DVD-Quant, arXiv 2505.18663: bounded-init grid
    refinement).

    With codes q of the present scale s and zero point z, the best scale is <q - z, x> / <q - z, q - z> and the best
    zero point the mean of q - x / s, which is rounded and kept on the grid; then the codes are taken anew. A turn may
    not better the error, because of the rounding, so the best of all is kept for each range. The source takes the row
    statistic of clamped differences and iterates until nothing changes.

    Args:
        x: [..., size].
        grid: Of the codes.
        scale, zero_point: [..., 1] where the turns begin; no zero point if symmetric.
        total: Sums an array like x over the values that share a range, to the shape of `scale`.
    """
    count = total(jnp.ones_like(x))

    def error(parameters: Parameters) -> tuple[jax.Array, jax.Array]:
        codes = grid.encode(x, *parameters)
        return codes, total(jnp.square(grid.decode(codes, *parameters) - x))

    def turn(carry, _):
        parameters, best_error, best = carry
        codes, _ = error(parameters)
        scale, zero_point = parameters
        centred = codes if zero_point is None else codes - zero_point
        square = total(jnp.square(centred))
        scale = jnp.where(square > 0, total(centred * x) / jnp.where(square > 0, square, 1), scale)
        # All codes may be those of zero, and a scale of zero or less is none.
        scale = jnp.where(scale > 0, scale, parameters[0])
        if zero_point is not None:
            zero_point = jnp.clip(jnp.round(total(codes - x / scale) / count), grid.low, grid.high)
        parameters = (scale, zero_point)
        _, new_error = error(parameters)
        better = new_error < best_error
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), parameters, best)
        return (parameters, jnp.minimum(new_error, best_error), best), None

    start = (scale, zero_point)
    (_, _, best), _ = jax.lax.scan(turn, (start, error(start)[1], start), length=TURNS)
    return best
