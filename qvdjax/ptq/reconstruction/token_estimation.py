"""Trained estimates of what rounding takes off a product, and trained steps of weights: what Q-VDiT learns."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from qvdjax.nn import InputTransform, LayerScheme, StandIn, Statistic, TokenEstimator
from qvdjax.nn.token_estimator import estimate
from qvdjax.numerics import fake_quantize
from qvdjax.ptq.reconstruction.learned_transform import Learned

Gains = Literal["formula", "ones"]


@dataclasses.dataclass(frozen=True)
class TokenEstimation:
    """How estimates begin (arXiv 2505.22167, section 3.2).

    Attributes:
        gains: What the gains of frames start as: "formula", eta / omega with eta the softmax over frames of 1 minus the
            cosine of a frame and its rounded form, and omega the frame's share of the input's magnitudes, as in the
            paper; "ones", as in the release.
        of_frames: Whether there are gains, in layers that see the video's tokens.
        seed: Of `down`, which starts uniform in +-1 / sqrt(in), as PyTorch's Kaiming initialisation of a linear layer.
    """

    gains: Gains = "formula"
    of_frames: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.gains not in get_args(Gains):
            raise ValueError(f"gains start as {' or '.join(get_args(Gains))}, not {self.gains!r}")


class LearnedStep(Learned):
    """The logarithm of a step of the weight's grid over its start."""


class SteppedWeight(nnx.Module):
    """The two operands of a product: the input, under a transform that is not trained, and the weight rounded to the
    nearest code of a grid whose steps are trained and whose zero points are not.

    Attributes:
        transform: Of the input, or None.
        scale, zero_point: [out or 1, groups], as they started; no zero point if symmetric.
        log_step: As `scale`.
    """

    def __init__(self, weight: jax.Array, scheme: LayerScheme, transform: InputTransform | None, axes: tuple):
        """`weight` [out, in] before the transform, of logical axes `axes`; `scheme` quantizes it."""
        self.transform, self.quantizer = transform, scheme.weight
        scale, zero_point = _first_scale(weight, transform, quantizer=scheme.weight)
        rows = {"axes": (None if scheme.weight.granularity == "tensor" else axes[0], None)}
        self.scale = nnx.Variable(scale, **rows)
        self.zero_point = None if zero_point is None else nnx.Variable(zero_point, **rows)
        self.log_step = LearnedStep(jnp.zeros_like(scale), **rows)

    def _parameters(self):
        zero_point = None if self.zero_point is None else self.zero_point[...]
        return self.scale[...] * jnp.exp(self.log_step[...]), zero_point

    def __call__(self, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., in] and the weight [out, in] -> both transformed, the weight rounded."""
        if self.transform is not None:
            x, weight = self.transform(x), self.transform.on_weight(weight)
        return x, fake_quantize(weight, self.quantizer.grid, *self._parameters())

    def learned(self) -> dict[str, Any]:
        """`weight_scale`, scale and zero point, and the arrays of the transform."""
        found: dict[str, Any] = {"weight_scale": self._parameters()}
        return found if self.transform is None else {**found, "transform": self.transform.arrays()}


@jax.jit(static_argnames="quantizer")
def _first_scale(weight: jax.Array, transform: InputTransform | None, *, quantizer):
    weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    return quantizer.scale_of(weight if transform is None else transform.on_weight(weight))


class LearnedEstimator(nnx.Module):
    """A trained `qvdjax.nn.token_estimator.EstimatorBranch`, which estimates nothing at first.

    Attributes:
        start_down: [rank, in]. down: [rank, in], what is added to it by training. up: [out, rank].
        gain: [frames], the gains minus one; None without gains.
    """

    def __init__(self, shape: tuple[int, int], scheme: TokenEstimator, plan: TokenEstimation, axes: tuple):
        """`shape` [out, in] and logical axes of the layer's weight."""
        out, width = shape
        key = jax.random.fold_in(jax.random.key(plan.seed), width)
        down = jax.random.uniform(key, (scheme.rank, width), jnp.float32, -1, 1) / width**0.5
        self.scheme = scheme
        self.start_down = nnx.Variable(down, axes=(None, axes[1]))
        self.down = Learned(jnp.zeros_like(down), axes=(None, axes[1]))
        self.up = Learned(jnp.zeros((out, scheme.rank), jnp.float32), axes=(axes[0], None))
        gains = scheme.frames is not None
        self.gain = Learned(jnp.zeros(scheme.frames, jnp.float32), axes=(None,)) if gains else None

    def learned(self) -> dict[str, jax.Array]:
        """The arrays of an EstimatorBranch."""
        found = {"down": self.start_down[...] + self.down[...], "up": self.up[...]}
        return found if self.gain is None else {**found, "gain": 1 + self.gain[...]}

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., tokens, in], rounded -> [..., tokens, out]."""
        now = self.learned()
        return estimate(x, now["down"], now["up"], now.get("gain"), self.scheme)


class FrameStatistics(StandIn):
    """A layer around which the two statistics of an input's frames are kept, of its last call.

    Attributes:
        layer: Whose `rounded` gives the input before and after rounding.
        similarity: [frames], cosine of a frame and its rounded form, mean over samples.
        share: [frames], a frame's part of the sum of magnitudes, likewise.
    """

    def __init__(self, layer: nnx.Module):
        self.layer, self.scheme = layer, layer.estimator.scheme
        self.similarity, self.share = (Statistic(jnp.zeros(self.scheme.frames), axes=(None,)) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, tokens, in], as the layer."""
        whole, rounded = (self._frames(a) for a in self.layer.rounded(x))
        norms = jnp.linalg.norm(whole, axis=-1) * jnp.linalg.norm(rounded, axis=-1)
        self.similarity[...] = ((whole * rounded).sum(axis=-1) / jnp.maximum(norms, 1e-30)).mean(axis=0)
        sizes = jnp.abs(whole).sum(axis=-1)  # batch frames
        self.share[...] = (sizes / jnp.maximum(sizes.sum(axis=-1, keepdims=True), 1e-30)).mean(axis=0)
        return self.layer(x)

    def _frames(self, x: jax.Array) -> jax.Array:
        video = x[..., self.scheme.before : x.shape[-2] - self.scheme.after, :].astype(jnp.float32)
        return rearrange(video, "b (f s) d -> b f (s d)", f=self.scheme.frames)


def first_gains(similarity: jax.Array, share: jax.Array) -> jax.Array:
    """Gains [frames] of the paper's formula, eta / omega: one for each where frames are alike."""
    return jax.nn.softmax(1 - similarity) / jnp.maximum(share, 1e-30)
