"""A learned estimate, frame by frame, of what the rounding of a weight takes off a product (Q-VDiT's TQE)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn.variables import Scale, shape_of


@dataclasses.dataclass(frozen=True)
class TokenEstimator:
    """Which tokens of a layer's input have a gain in common. Tokens are text, then video frame by frame, then text.

    Attributes:
        rank: Of the estimate.
        frames: Gains, one for each of so many equal parts of the video's tokens, that is for each frame of videos as
            long as those of the calibration; None for no gain.
        before, after: Tokens of text on both sides of the video's. They have a gain of one.
    """

    rank: int = 1
    frames: int | None = None
    before: int = 0
    after: int = 0

    def __post_init__(self):
        if self.rank < 1 or (self.frames is not None and self.frames < 1):
            raise ValueError(f"an estimate has a rank and frames of at least 1, not {self.rank} and {self.frames}")
        if self.before < 0 or self.after < 0 or (self.frames is None and self.before + self.after):
            raise ValueError(f"{self.before} and {self.after} tokens of text do not go with {self.frames} frames")

    def of_tokens(self, gain: jax.Array, tokens: int) -> jax.Array:
        """gain [frames] -> [tokens].

        Raises:
            UserError: The video's tokens do not divide into so many parts.
        """
        size, rest = divmod(tokens - self.before - self.after, self.frames)
        if rest or size < 1:
            raise UserError(
                f"{tokens} tokens, {self.before + self.after} of them text, do not divide into {self.frames} frames",
                remedy="sample videos of as many frames as the calibration's, with texts as long",
            )
        text = (jnp.ones(count, gain.dtype) for count in (self.before, self.after))
        return jnp.concatenate([next(text), jnp.repeat(gain, size), next(text)])


class EstimatorBranch(nnx.Module):
    """gain_token (up down x): what is added to a product of rounded numbers (arXiv 2505.22167, section 3.2).

    Attributes:
        down: [rank, in] float32. up: [out, rank] float32. gain: [frames] float32, or None.
    """

    def __init__(
        self, *, down: jax.Array, up: jax.Array, gain: jax.Array | None = None, scheme: TokenEstimator, axes: tuple
    ):  # fmt: skip
        """`axes` names the two axes of the layer's weight."""
        self.down, self.up = Scale(down, axes=(None, axes[1])), Scale(up, axes=(axes[0], None))
        self.gain = None if gain is None else Scale(gain, axes=(None,))
        self.scheme = scheme

    @staticmethod
    def blank_arrays(scheme: TokenEstimator, shape: tuple[int, int]) -> dict[str, jax.Array]:
        """Arrays, for a weight [out, in], that add nothing."""
        out, width = shape
        zeros = {"down": (scheme.rank, width), "up": (out, scheme.rank)}
        arrays = {name: jnp.zeros(shape, jnp.float32) for name, shape in zeros.items()}
        return arrays if scheme.frames is None else {**arrays, "gain": jnp.ones((scheme.frames,), jnp.float32)}

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., tokens, in], as rounded as the product sees it -> [..., tokens, out], at least float32."""
        gain = None if self.gain is None else self.gain[...]
        return estimate(x, self.down[...], self.up[...], gain, self.scheme)

    @property
    def rank(self) -> int:
        """Of one layer's estimate."""
        return shape_of(self.down)[-2]


def estimate(x: jax.Array, down: jax.Array, up: jax.Array, gain: jax.Array | None, scheme: TokenEstimator) -> jax.Array:
    """x [..., tokens, in], down [rank, in], up [out, rank], gain [frames] or None -> [..., tokens, out]."""
    contract = lambda x, w: jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())))  # noqa: E731
    inner = contract(x.astype(jnp.promote_types(x.dtype, down.dtype)), down)  # [..., tokens, rank]
    if gain is not None:
        inner = inner * scheme.of_tokens(gain, x.shape[-2])[:, None]  # tokens -> tokens 1
    return contract(inner, up)
