"""AdaRound: whether a weight becomes the code below or the one above it is trained."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from flax import nnx

from qvdjax.nn import InputTransform, LayerScheme
from qvdjax.nn.variables import iterate
from qvdjax.numerics import QTensor, Quantizer, storage_dtype
from qvdjax.ptq.layers import transformed_weight
from qvdjax.ptq.reconstruction.learned_transform import Learned

LOW, HIGH = -0.1, 1.1  # gamma and zeta of arXiv 2004.10568: the ends of the sigmoid before it is clipped


@dataclasses.dataclass(frozen=True)
class AdaptiveRounding:
    """How the rounding of weights is trained (AdaRound, Nagel et al. 2020, arXiv 2004.10568).

    A weight w of step s is s (floor(w / s) + h(v)) with the rectified sigmoid h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1),
    which starts at what the floor leaves, so that nothing is rounded at first. A penalty drives h to 0 or 1:

        penalty * sum over weights of 1 - |2 h - 1|^beta

    A large beta touches those that are nearly there alone; as it falls the others follow. After training h is 0 or 1.

    Sources take the squared error summed over a layer's or block's outputs and averaged over examples. Here it is their
    mean, relative to what the block changes of the stream (`Reconstruction.unit`), and the penalty is divided by the
    stream's width to match: the balance is that of the sources where a block changes its stream by one, and the same
    whatever a model's stream is scaled by.

    Attributes:
        penalty: lambda; 0.01 in the paper and in all releases read (BRECQ, Q-Diffusion, PTQ4DiT).
        warm_up: Share of the steps before the penalty counts (0.2 in these releases).
        beta_start, beta_end: Of beta, which falls evenly over the steps after the warm-up (20 and 2, likewise).
        rate: Adam's, constant and without weight decay. Releases leave PyTorch's 1e-3 and take 20,000 steps.
    """

    penalty: float = 0.01
    warm_up: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    rate: float = 1e-3

    def __post_init__(self):
        if not (self.penalty >= 0 and self.rate > 0):
            raise ValueError(f"the rounding's penalty {self.penalty} or rate {self.rate} is not positive")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"the warm-up is a share of the steps in 0 to 1, not {self.warm_up}")
        if not self.beta_start >= self.beta_end >= 1:
            raise ValueError(f"beta falls from {self.beta_start} to {self.beta_end}: it has to fall, to 1 at least")

    def penalty_of(self, block: nnx.Module, progress: jax.Array) -> jax.Array:
        """The penalty of all weights of a block whose rounding is trained; progress [] is the share of steps done."""
        late = jnp.clip((progress - self.warm_up) / (1 - self.warm_up), 0, 1)
        beta = self.beta_start + (self.beta_end - self.beta_start) * late
        shares = [weight.share() for _, weight in iterate(block, AdaptivelyRoundedWeight)]
        undecided = sum((1 - jnp.abs(2 * share - 1) ** beta).sum() for share in shares)
        return jnp.where(progress >= self.warm_up, self.penalty, 0) * undecided


class RoundingLogits(Learned):
    """v: the rectified sigmoid is the share of the code above."""


def rectified_sigmoid(logits: jax.Array) -> jax.Array:
    """h(v), in 0 to 1; both are reached at finite logits, with a gradient of zero beyond."""
    return jnp.clip(LOW + (HIGH - LOW) * jax.nn.sigmoid(logits), 0, 1)


def logits_of(share: jax.Array) -> jax.Array:
    """The inverse of `rectified_sigmoid` for shares of 0 to 1."""
    unit = (share - LOW) / (HIGH - LOW)
    return jnp.log(unit) - jnp.log1p(-unit)


class AdaptivelyRoundedWeight(nnx.Module):
    """The two operands of a product: the input, under a transform that is not trained, and the weight, whose rounding
    is.

    Everything but the logits is made once: a floor that two programs find differently in its last bit would be off by
    a whole step.

    Of a convolution `in` is (channels positions), with that many positions in its kernel.

    Attributes:
        transform: Of the input, or None.
        below: [out, in] int16, the code below each weight; for a weight beyond the range the nearest to it of those on
            the grid and the one just off it.
        scale, zero_point: [out or 1, groups]; no zero point if symmetric. Of a weight in parts with ranges of their own
            [out or 1, parts].
        parts: How many columns each part has, None for groups of equal width.
        logits: [out, in].
    """

    def __init__(
        self, weight: jax.Array, scheme: LayerScheme, transform: InputTransform | None, axes: tuple, positions: int = 1
    ):
        """`weight` [out, in] before the transform, of logical axes `axes`; `scheme` quantizes it."""
        self.parts = None if scheme.split is None else tuple(positions * channels for channels in scheme.split)
        below, scale, zero_point, logits = _start(
            weight, transform, quantizer=scheme.weight, positions=positions, parts=self.parts
        )
        self.transform, self.quantizer = transform, scheme.weight
        self.below = nnx.Variable(below, axes=axes)
        rows = (None if scheme.weight.granularity == "tensor" else axes[0], None)
        self.scale = nnx.Variable(scale, axes=rows)
        self.zero_point = None if zero_point is None else nnx.Variable(zero_point, axes=rows)
        self.logits = RoundingLogits(logits, axes=axes)

    def share(self) -> jax.Array:
        """How much of the code above each weight has, [out, in] in 0 to 1."""
        return rectified_sigmoid(self.logits[...])

    def __call__(self, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., in or channels] and the weight [out, in] that this started from -> both transformed, the weight as
        rounded as it is by now."""
        grid, spread = self.quantizer.grid, functools.partial(_spread, width=weight.shape[-1], parts=self.parts)
        zero_point = None if self.zero_point is None else spread(self.zero_point[...])
        codes = jnp.clip(self.below[...] + self.share(), grid.low, grid.high)
        rounded = grid.decode(codes, spread(self.scale[...]), zero_point)
        return x if self.transform is None else self.transform(x), rounded

    def learned(self) -> dict[str, Any]:
        """The codes, as a QTensor, and the arrays of the transform."""
        bits, grid = self.quantizer.bits, self.quantizer.grid
        codes = jnp.clip(self.below[...] + (self.logits[...] >= 0), grid.low, grid.high).astype(storage_dtype(bits))
        zero_point = None if self.zero_point is None else self.zero_point[...]
        found: dict[str, Any] = {"weight": QTensor(codes, self.scale[...], zero_point, bits)}
        return found if self.transform is None else {**found, "transform": self.transform.arrays()}


@jax.jit(static_argnames=("quantizer", "positions", "parts"))
def _start(weight: jax.Array, transform: InputTransform | None, *, quantizer: Quantizer, positions: int, parts):
    """Codes below, scale, zero point, and the logits at which the weight is what it was."""
    weight = transformed_weight(weight, transform, positions)
    pieces = [weight] if parts is None else jnp.split(weight, np.cumsum(parts)[:-1], axis=-1)
    scale, zero_point = (
        None if found[0] is None else jnp.concatenate(found, axis=-1)
        for found in zip(*map(quantizer.scale_of, pieces), strict=True)
    )
    spread = functools.partial(_spread, width=weight.shape[-1], parts=parts)
    place = weight / spread(scale)
    if zero_point is not None:
        place = place + spread(zero_point)
    # One below the grid: its code above is the lowest, and any share of it is clipped to that.
    below = jnp.clip(jnp.floor(place), quantizer.grid.low - 1, quantizer.grid.high)
    return below.astype(jnp.int16), scale, zero_point, logits_of(jnp.clip(place - below, 0, 1))


def _spread(parameter: jax.Array, width: int, parts: tuple[int, ...] | None) -> jax.Array:
    """[rows, groups] -> [rows, width]: groups of equal width, or parts of widths of their own."""
    if parts is not None:
        return parameter[:, np.repeat(np.arange(len(parts)), parts)]  # rows parts -> rows (parts columns)
    return repeat(parameter, "rows groups -> rows (groups size)", size=width // parameter.shape[-1])


def hardened(block: nnx.Module) -> nnx.Module:
    """The block with every trained rounding decided; it shares all else, and runs in the same programs.

    Logits that are not numbers stay what they are, so that training that failed shows.
    """

    def decided(logits):
        return jnp.where(jnp.isnan(logits), logits, jnp.where(logits >= 0, jnp.inf, -jnp.inf))

    graph, logits, rest = nnx.split(block, RoundingLogits, ...)
    return nnx.merge(graph, jax.tree.map(decided, logits), rest)
