"""GPTQ: a weight's columns are rounded one after the other, and those to come make up for the error of each."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import repeat

from qvdjax.numerics import Grid, QTensor, Quantizer, storage_dtype

_HIGHEST = jax.lax.Precision.HIGHEST  # the default of accelerators rounds operands to bfloat16 or tf32


class RoundedInputs(NamedTuple):
    """What a layer gets of its transformed inputs X once they are rounded to Y, summed over tokens.

    Attributes:
        moment: Y^T Y, [in, in].
        cross: Y^T X, [in, in].
    """

    moment: jax.Array
    cross: jax.Array

    def fitted(self, weight: jax.Array, damping: float) -> jax.Array:
        """The weight [out, in] whose product with rounded inputs is nearest to that of `weight` with exact ones.

        Directions in which rounding hides the inputs count less: Wiener's filter. Least squares, with `damping` as in
        `ErrorCompensation` pulling towards the weight itself.
        """
        diagonal = jnp.diagonal(self.moment)
        damped = self.moment + _damping(diagonal, damping) * jnp.eye(len(diagonal), dtype=self.moment.dtype)
        lost = jnp.matmul(self.cross - self.moment, weight.T, precision=_HIGHEST)  # [in, out]
        return weight + jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), lost).T


@dataclasses.dataclass(frozen=True)
class ErrorCompensation:
    """How weights are rounded so that the error of a layer's output over its calibrated inputs is small.

    Algorithm 1 of Frantar et al. 2022 (arXiv 2210.17323). Scales are those of the weight before any column is rounded,
    also in groups (the released code's `static_groups`), so that columns may be taken in any order.

    Attributes:
        damping: Added to the diagonal of the second moments, in units of its mean (the release: 0.01).
        act_order: Columns of large inputs first (the release's `--act-order`) instead of in their own order.
        block: Columns after which the errors of a block are handed on to all later ones at once.
        rounded_inputs: The weight is first fitted to inputs as they are rounded (`RoundedInputs`), and second moments
            are of those, as GPTAQ has it (arXiv 2504.02692), whose inputs carry the errors of earlier layers too.
            False, as published, for exact inputs.
        memory: GiB of second moments that are collected at a time; each pass over the calibration set collects so many,
            at least one layer's, and needs twice as much for a moment.
    """

    damping: float = 0.01
    act_order: bool = False
    block: int = 128
    memory: float = 4.0
    rounded_inputs: bool = False

    def __post_init__(self):
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, not {self.damping}")
        if self.block < 1 or not self.memory > 0:
            raise ValueError(f"block {self.block} and memory {self.memory} must be positive")

    def round(
        self, weight: jax.Array, moment: jax.Array | RoundedInputs, quantizer: Quantizer, clip: tuple | None = None
    ) -> tuple[QTensor, jax.Array]:
        """Codes of a weight [out, in] for inputs of second moments [in, in], summed or averaged over tokens; fitted to
        inputs first that are known as rounded.

        A channel that is always zero stays uncorrelated with all others and is rounded to the nearest code. `clip`
        narrows ranges (`Quantizer.scale_of`).

        Returns:
            The codes, and whether the second moments could be factored ([] bool); false asks for more damping.
        """
        if isinstance(moment, RoundedInputs):
            weight, moment = moment.fitted(weight, self.damping), moment.moment
        scale, zero_point = quantizer.scale_of(weight, clip)
        size = weight.shape[-1] // scale.shape[-1]
        # [out or 1, groups] -> [out or 1, in]
        columns = [None if a is None else repeat(a, "o g -> o (g s)", s=size) for a in (scale, zero_point)]
        diagonal = jnp.diagonal(moment)
        order = jnp.argsort(-diagonal, stable=True) if self.act_order else jnp.arange(len(diagonal))
        factor = _inverse_factor(moment[order][:, order], self.damping)
        ordered = [None if a is None else a[:, order].T for a in (weight, *columns)]  # [out, in] -> [in, out]
        codes = _round_rows(*ordered, factor, grid=quantizer.grid, block=self.block)
        codes = codes[jnp.argsort(order)].T.astype(storage_dtype(quantizer.bits))  # [in, out] -> [out, in]
        return QTensor(codes, scale, zero_point, quantizer.bits, quantizer.codebook), jnp.isfinite(factor).all()


def _damping(diagonal: jax.Array, damping: float) -> jax.Array:
    """What is added to a diagonal [in]; 1 where nothing was ever met."""
    mean = diagonal.mean()
    return jnp.where(mean > 0, damping * mean, 1)


def _inverse_factor(moment: jax.Array, damping: float) -> jax.Array:
    """The upper triangular U with U^T U the inverse of the damped moment [in, in].

    With both axes reversed a Cholesky factor M of the moment is upper triangular, and its inverse is U: one
    factorization and one triangular solve, without the inverse itself.
    """
    damped = moment + _damping(jnp.diagonal(moment), damping) * jnp.eye(len(moment), dtype=moment.dtype)
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    identity = jnp.eye(len(moment), dtype=moment.dtype)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1]


def _round_rows(weight, scale, zero_point, factor, *, grid: Grid, block: int) -> jax.Array:
    """Float codes [in, out] of a transposed weight [in, out]; scale and zero point [in, out or 1], factor [in, in].

    Blocks are padded to equal length by zeros that the factor connects with nothing.
    """
    width = len(weight)
    block = min(block, width)
    rest = -width % block
    weight, scale = jnp.pad(weight, ((0, rest), (0, 0))), jnp.pad(scale, ((0, rest), (0, 0)), constant_values=1)
    zero_point = None if zero_point is None else jnp.pad(zero_point, ((0, rest), (0, 0)))
    factor = jax.scipy.linalg.block_diag(factor, jnp.eye(rest, dtype=factor.dtype)) if rest else factor

    def one_block(number, carry):
        weight, codes = carry
        part_of = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=number * block, slice_size=block)
        part, rows, scales = part_of(weight), part_of(factor), part_of(scale)
        zero_points = None if zero_point is None else part_of(zero_point)
        own = part_of(rows, axis=1)  # [block, block]

        def one_column(i, carry):
            part, part_codes, errors = carry
            zero = None if zero_points is None else zero_points[i]
            code = grid.encode(part[i], scales[i], zero)
            error = (part[i] - grid.decode(code, scales[i], zero)) / own[i, i]  # [out]
            part = part - own[i][:, None] * error  # the factor is zero for the columns that are done
            return part, part_codes.at[i].set(code), errors.at[i].set(error)

        blank = jnp.zeros_like(part)
        _, part_codes, errors = jax.lax.fori_loop(0, block, one_column, (part, blank, blank))
        weight = weight - jnp.matmul(rows.T, errors, precision=_HIGHEST)
        return weight, jax.lax.dynamic_update_slice_in_dim(codes, part_codes, number * block, axis=0)

    _, codes = jax.lax.fori_loop(0, len(weight) // block, one_block, (weight, jnp.zeros_like(weight)))
    return codes[:width]
