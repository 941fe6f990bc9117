"""LearnedLinear: a linear layer whose quantizers are trained with it."""

import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import (
    Attention,
    AttentionScheme,
    LayerScheme,
    Linear,
    Param,
    PerCall,
    TimestepReader,
    VideoModel,
    swap_layers,
)
from qvdjax.nn.variables import iterate, shape_of
from qvdjax.numerics import fake_quantize_dynamic
from qvdjax.qat import learned_clips, learned_weights
from qvdjax.qat.straight_through import check_trainable


class LearnedScale(Param):
    """Step sizes of a weight, float32 [out or 1, groups]: a Param of its own kind, for a learning rate of its own."""


class LearnedZeroPoint(Param):
    """Zero points of a weight in codes, fractional, float32 [out or 1, groups]."""


class ClipLogit(Param):
    """Logits of an input clip, float32 [count, sides]."""


class LearnedLinear(TimestepReader):
    """A Linear whose weight and input are rounded by trainable quantizers on every call.

    Whatever a scheme leaves float stays float; a dynamic input without `input_clip` is rounded as it comes.

    Attributes:
        weight, bias: The Linear's own.
        weight_scale, weight_zero_point: LSQ's and LSQ+'s parameters, None where the scheme has none.
        clip_logits: Of the input's range, or None.
        scaled_gradients: Whether those of scale and zero point are divided by sqrt(n P).
        auxiliary: A module whose `weight(gamma)` [out, in] is added to the rounded weight (see `qvdjax.qat.phi`), so
            that it meets the rounded input: W_q x_q + Phi(x_q) (QVGen equation 9) costs no second product. None for
            none; may be set later.
        gamma: What the auxiliary module gets, put there by `with_gamma` for each call.
        adapter: A module whose `weight()` [out, in] is added to the weight before it is rounded (see
            `qvdjax.qat.adapter`). None for none; may be set later.
    """

    auxiliary: nnx.Module | None = None
    adapter: nnx.Module | None = None
    gamma: PerCall | None = None

    def __init__(
        self, linear: Linear, scheme: LayerScheme, *, scale: jax.Array | None, zero_point: jax.Array | None,
        clip_logits: jax.Array | None, scaled_gradients: bool = True,
    ):  # fmt: skip
        whole = scheme.weight is None or scheme.weight.granularity == "tensor"
        own = {"axes": (None if whole else linear.axes[0], None), "keep_float32": True}
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_scale = None if scale is None else LearnedScale(scale, **own)
        self.weight_zero_point = None if zero_point is None else LearnedZeroPoint(zero_point, **own)
        logits = {"axes": (None, None), "keep_float32": True}
        self.clip_logits = None if clip_logits is None else ClipLogit(clip_logits, **logits)
        self.role, self.axes, self.scheme, self.scaled_gradients = linear.role, linear.axes, scheme, scaled_gradients

    def whole_weight(self) -> jax.Array:
        """The weight [out, in] that is rounded: with its adapter, where it has one."""
        return self.weight[...] if self.adapter is None else self.weight[...] + self.adapter.weight()

    def rounded_weight(self) -> jax.Array:
        """The weight [out, in] on its grid, without the auxiliary module; float32 where it is rounded."""
        if self.scheme.weight is None:
            return self.weight[...]
        zero_point = None if self.weight_zero_point is None else self.weight_zero_point[...]
        return learned_weights.fake_quantize_learned(
            self.whole_weight(), self.scheme.weight.grid, self.weight_scale[...], zero_point,
            scaled_gradients=self.scaled_gradients,
        )  # fmt: skip

    def rounded_input(self, x: jax.Array) -> jax.Array:
        """x [..., in] on its grid; float32 where it is rounded."""
        activation, clip = self.scheme.activation, self.scheme.input_clip
        if activation is None:
            return x
        if clip is None:
            return fake_quantize_dynamic(x, activation)
        factors = self.clip_factors(learned_clips.table(self.clip_logits[...], clip), x)
        return learned_clips.fake_quantize_clipped(x, activation, factors)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., tokens, in] -> [..., tokens, out], in x's type."""
        weight, y = self.rounded_weight(), self.rounded_input(x)
        if self.auxiliary is not None:
            weight = weight + self.auxiliary.weight(self._gamma())
        y = jax.lax.dot_general(y.astype(x.dtype), weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def _gamma(self) -> jax.Array:
        if self.gamma is None:
            raise UserError(
                "a layer with an auxiliary module was called without gamma", remedy="call with_gamma(model, gamma)"
            )
        return self.gamma[...]


def learned(
    model: VideoModel, schemes: Mapping[str, LayerScheme | AttentionScheme], *, start: learned_weights.Start = "search",
    scaled_gradients: bool = True,
) -> VideoModel:  # fmt: skip
    """The model with its linear layers as `schemes` (by name in diffusers) says, quantizers trainable beside weights.

    Args:
        model: A float model; abstract ones work under `jax.eval_shape`. Left as it is.
        schemes: One scheme a layer and block.
        start: Where step sizes and zero points begin, see `learned_weights.start`.
        scaled_gradients: LSQ's gradient scale.

    Raises:
        UserError: A scheme with a static range or a transform, which come from calibration; a convolution; a group size
            that does not divide the layer's width.
    """

    def make(layer, scheme, names):
        if isinstance(layer, Attention) or not scheme.quantizes:
            layer.scheme = scheme
            return layer
        check_trainable(layer, scheme, names[0])
        return learned_linear(layer, scheme, start=start, scaled_gradients=scaled_gradients)

    return swap_layers(model, schemes, make)


def rounded_layers(model: nnx.Module, key: jax.Array | None) -> Iterator[tuple[LearnedLinear, jax.Array]]:
    """The LearnedLinear layers whose weight is rounded, each with a key of its own.

    `key` is folded with the layer's number; None is `jax.random.key(0)`.
    """
    key = jax.random.key(0) if key is None else key
    for number, (_, layer) in enumerate(iterate(model, LearnedLinear)):
        if layer.scheme.weight is not None:
            yield layer, jax.random.fold_in(key, number)


def learned_linear(
    linear: Linear, scheme: LayerScheme, *, start: learned_weights.Start = "search", scaled_gradients: bool = True
) -> LearnedLinear:
    """One layer, or a stack of them whose arrays carry a leading axis of layers."""
    shape = shape_of(linear.weight)
    scheme.check_width(shape[-1])
    scale = zero_point = logits = None
    if scheme.weight is not None:
        scale, zero_point = _start_stack(linear.weight[...], scheme=scheme, method=start)
    if scheme.input_clip is not None:
        logits = learned_clips.start_logits(scheme.input_clip, scheme.activation.symmetric)
        logits = jnp.broadcast_to(logits, (*shape[:-2], *logits.shape))  # [count, sides] -> [[layers,] count, sides]
    return LearnedLinear(
        linear, scheme, scale=scale, zero_point=zero_point, clip_logits=logits, scaled_gradients=scaled_gradients
    )


@functools.partial(jax.jit, static_argnames=("scheme", "method"))
def _start_stack(weight, *, scheme: LayerScheme, method):
    """Layer by layer, so that the temporaries of the search are one layer's."""
    one = functools.partial(learned_weights.start, quantizer=scheme.weight, method=method)
    return one(weight) if weight.ndim == 2 else jax.lax.map(one, weight)
