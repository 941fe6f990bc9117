"""One bit more for the output channels of a weight with outliers, one less for those with the fewest (MPQ-DM)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvdjax.calibration.watching import Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Conv, InputTransform, LayerScheme, Linear, Param, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, replace, shallow_copy
from qvdjax.numerics import BITS, QTensor, Quantizer, encode, storage_dtype
from qvdjax.parallel import to_host
from qvdjax.ptq.layers import transformed_weight
from qvdjax.ptq.range_search import transform_of


@dataclasses.dataclass(frozen=True)
class ChannelBits:
    """Outlier-driven mixed quantization inside a layer (MPQ-DM, Feng et al., AAAI 2025, arXiv 2412.11549).

    Of the output channels of a weight, those `share` with the largest kurtosis get one bit more than the recipe's, as
    many with the smallest one less, so that the average stays; a layer keeps that only where it lowers the squared
    error of what the layer gives. Read in cantbebetter2/MPQ-DM at 2b05dd7.

    All codes of such a layer lie in one array as wide as its widest channel: that is what it is stored in, and what is
    reported. Nothing is shared out at 8 bits, the widest that there are; 2 bits are the fewest that a channel can have.

    Attributes:
        share: Of the output channels, each way (the release: 0.1).
    """

    share: float = 0.1

    def __post_init__(self):
        if not 0 < self.share <= 0.5:
            raise ValueError(f"a share of the channels lies in 0 to 0.5, not {self.share}")

    def shares_out(self, quantizer: Quantizer | None) -> bool:
        """Whether there is anything to share out."""
        return quantizer is not None and quantizer.bits + 1 in BITS and quantizer.granularity == "channel"

    def bits_of(self, weight: jax.Array, bits: int) -> jax.Array:
        """weight [out, in] -> bits of each output channel, [out] int32; at least one channel each way."""
        rank = jnp.argsort(jnp.argsort(kurtosis(weight)))  # 0 for the smallest
        out = len(weight)
        moved = max(1, round(self.share * out)) if out > 1 else 0
        extra = jnp.where(rank >= out - moved, 1, jnp.where(rank < moved, -1, 0))
        return jnp.clip(bits + extra, min(BITS), max(BITS))

    def encode(self, weight: jax.Array, quantizer: Quantizer) -> QTensor:
        """weight [out, in] -> codes of `quantizer.bits` + 1 bits, each channel's within its own."""
        own = self.bits_of(weight, quantizer.bits)
        chosen = None
        for bits in sorted({max(quantizer.bits - 1, min(BITS)), quantizer.bits, quantizer.bits + 1}):
            narrow = dataclasses.replace(quantizer, bits=bits)
            found = encode(weight, narrow.grid, *narrow.scale_of(weight), jnp.int8)
            arrays = [found.codes, found.scale] + ([] if found.zero_point is None else [found.zero_point])
            here = (own == bits)[:, None]
            chosen = arrays if chosen is None else [
                jnp.where(here, new, old) for new, old in zip(arrays, chosen, strict=True)
            ]  # fmt: skip
        (codes, scale, *zero), bits = chosen, quantizer.bits + 1
        return QTensor(codes.astype(storage_dtype(bits)), scale, zero[0] if zero else None, bits)


def kurtosis(weight: jax.Array) -> jax.Array:
    """weight [out, in] -> fourth central moment over the square of the second, [out]; 0 for constant channels."""
    centred = weight - weight.mean(axis=-1, keepdims=True)
    second = jnp.square(centred).mean(axis=-1)
    return jnp.where(second > 0, (centred**4).mean(axis=-1) / jnp.where(second > 0, second**2, 1), 0)


class Judged(Watcher):
    """A layer that keeps the squared error of its last output with its weight rounded, all channels alike and mixed.

    Attributes:
        errors: [2].
        transform: What the input passes through, or None.
    """

    def __init__(
        self, layer: Linear | Conv, leading: tuple[int, ...], transform: InputTransform | None, quantizer: Quantizer,
        how: ChannelBits,
    ):  # fmt: skip
        super().__init__(layer)
        self.errors = Statistic(jnp.zeros((*leading, 2), jnp.float32), axes=(None,))
        self.transform, self.quantizer, self.how = transform, quantizer, how

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        exact = self.layer(x).astype(jnp.float32)
        met = x if self.transform is None else self.transform(x)
        weight = _transformed(self.layer, self.transform)
        found = []
        for rounded in (encode(weight, self.quantizer.grid, *self.quantizer.scale_of(weight)),
                        self.how.encode(weight, self.quantizer)):  # fmt: skip
            layer = shallow_copy(self.layer)
            layer.weight = Param(rounded.dequantize().reshape(self.layer.weight[...].shape), axes=self.layer.axes)
            found.append(jnp.square(layer(met).astype(jnp.float32) - exact).sum())
        self.errors[...] = jnp.stack(found)


def _transformed(layer: Linear | Conv, transform: InputTransform | None) -> jax.Array:
    """The weight that meets the transformed input, [out, (channels positions)]."""
    weight = layer.weight[...]
    positions = int(np.prod(getattr(layer, "kernel", ()), dtype=int))
    return transformed_weight(weight.reshape(len(weight), -1), transform, positions)


_observe = jax.jit(observe)


def share_out_channels(
    model: VideoModel, schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]], how: ChannelBits, *,
    fit=None, ranges: Mapping[str, tuple] | None = None,
) -> tuple[dict[str, Any], dict[str, dict]]:  # fmt: skip
    """Which layers are better off with mixed channels, and their codes.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name in diffusers. Blocks of one stack are quantized alike.
        batches: Keyword arguments of the model's call.
        how: How channels share.
        fit, ranges: Of the transforms, as `apply_schemes` takes them.

    Returns:
        The schemes, with the wider weights; and by name what `qvdjax.ptq.rounded_layers` takes as `learned`.

    Raises:
        UserError: No batch; errors that are not finite.
    """
    watched, total, transforms = shallow_copy(model), None, {}
    for names, path, layer in layers_of(model, (Linear, Conv)):
        scheme = schemes[names[0]]
        if not isinstance(scheme, LayerScheme) or not how.shares_out(scheme.weight) or scheme.split is not None:
            continue
        transform = transform_of(layer, names, scheme, fit, ranges)
        transforms[names[0]] = transform
        replace(watched, path, Judged(layer, leading_shape(layer.weight), transform, scheme.weight, how))
    if not transforms:
        return dict(schemes), {}
    for inputs in batches:
        new = jax.tree.map(lambda a: to_host(a).astype(np.float64), _observe(watched, dict(inputs)))
        total = new if total is None else jax.tree.map(np.add, total, new)
    if total is None:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    schemes, learned = dict(schemes), {}
    layers = {names[0]: layer for names, _, layer in layers_of(model, (Linear, Conv))}
    for names, kept in by_layer(watched, total):
        rows = np.reshape(kept["errors"], (len(names), 2))
        if not np.isfinite(rows).all():
            raise UserError("calibration met values that are not finite", remedy="check the calibration set")
        stacked = bool(leading_shape(layers[names[0]].weight))
        for i, (name, (alike, mixed)) in enumerate(zip(names, rows, strict=True)):
            if mixed >= alike:
                continue
            pair = layers[names[0]], transforms[names[0]]
            layer, transform = jax.tree.map(lambda a, i=i: a[i], pair) if stacked else pair
            scheme = schemes[name]
            learned[name] = {"weight": jax.tree.map(to_host, _encode(layer, transform, scheme.weight, how))}
            if transform is not None:
                learned[name]["transform"] = jax.tree.map(to_host, transform.arrays())
            wide = dataclasses.replace(scheme.weight, bits=scheme.weight.bits + 1)
            reason = f"{scheme.reason}; {how.share:.0%} of its outputs have one bit more, as many one less"
            schemes[name] = dataclasses.replace(scheme, weight=wide, reason=reason)
    return schemes, learned


@jax.jit(static_argnames=("quantizer", "how"))
def _encode(layer: nnx.Module, transform: InputTransform | None, quantizer: Quantizer, how: ChannelBits) -> QTensor:
    return how.encode(_transformed(layer, transform), quantizer)
