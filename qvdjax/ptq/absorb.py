"""Transforms that cost nothing: those of values, put into the layers that make values and read their averages."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvdjax.nn import AttentionScheme, CarriesValues, InputTransform, LayerScheme, Linear, Rotation, VideoModel
from qvdjax.nn.layers import layers_of
from qvdjax.nn.variables import at, iterate, leading_shape, shape_of
from qvdjax.numerics.hadamard import largest_order
from qvdjax.ptq.apply import Ranges
from qvdjax.ptq.transforms import FitChannelScale, FitRotation

Schemes = Mapping[str, LayerScheme | AttentionScheme]


def absorb_rotations(model: VideoModel, schemes: Schemes, fit: FitRotation) -> tuple[VideoModel, dict]:
    """A float model of the same function whose values are rotated, and the schemes without what that makes needless.

    Attention averages each head's features over tokens, so a rotation of them passes through it, as in QuaRot. Other
    products read norms that are modulated anew at each step, or come behind a nonlinearity: their rotation stays
    online. So does that of the text in cross-attention, although its embedder could take it where nothing lies between.

    Args:
        model: Left as it is.
        schemes: One a layer and block, by name in diffusers.
        fit: How inputs are rotated.

    Returns:
        The model, and the schemes: output layers behind rotated values have no transform of their own.
    """
    model, schemes = nnx.clone(model), dict(schemes)
    names = {path: found for found, path, _ in layers_of(model, (Linear,))}
    for path, module in iterate(model, CarriesValues):
        makers, readers = ([(*path, *rest) for rest in paths] for paths in (module.value_layers, module.output_layers))
        blocks = range(len(names[readers[0]]))
        rotated = np.array([all(schemes[names[reader][i]].rotation is not None for reader in readers) for i in blocks])
        features = shape_of(at(model, makers[0]).weight)[-2] // module.heads
        rotation = dataclasses.replace(fit.rotation, block=largest_order(features, fit.rotation.block))
        if not rotated.any() or rotation.block == 1:
            continue
        for maker in makers:
            _rotate_outputs(at(model, maker), _of_heads(fit, rotation, features, module.heads), rotated)
        for reader in readers:
            _rotate_inputs(at(model, reader), _of_heads(fit, rotation, features, module.heads), rotated)
            for i in np.flatnonzero(rotated):
                schemes[names[reader][i]] = _without_transform(schemes[names[reader][i]], "rotated")
    return model, schemes


def absorb_scales(
    model: VideoModel, schemes: Schemes, ranges: Ranges, fit: FitChannelScale
) -> tuple[VideoModel, dict, dict]:
    """A float model of the same function whose values are divided by the scale of the layers that read their averages.

    Exact up to the rounding of the weights' own type: an average over tokens of v / s is the average of v over s, and
    each output channel of the layers that make values has a range of its own, which is divided with it. Layers that
    read one attention's averages share a scale, fitted to all of their weights together. Other products keep theirs
    online, for the reasons that `absorb_rotations` gives.

    Args:
        model: Left as it is.
        schemes: One a layer and block, by name in diffusers.
        ranges: Smallest and largest input of each channel, by name.
        fit: How scales are fitted.

    Returns:
        The model; the schemes: output layers behind scaled values have no transform of their own; and the ranges of the
        model's inputs as they are now.
    """
    model, schemes, ranges = nnx.clone(model), dict(schemes), dict(ranges)
    names = {path: found for found, path, _ in layers_of(model, (Linear,))}
    for path, module in iterate(model, CarriesValues):
        makers, readers = ([(*path, *rest) for rest in paths] for paths in (module.value_layers, module.output_layers))
        stacked = bool(leading_shape(at(model, readers[0]).weight))
        scales = []
        for own in zip(*(names[reader] for reader in readers), strict=True):
            block = len(scales) if stacked else ...
            weight = jnp.concatenate([at(model, reader).weight[...][block] for reader in readers])  # (readers out) in
            if any(schemes[name].transforms != ("smooth_scale",) for name in own):
                scales.append(jnp.ones(weight.shape[-1], jnp.float32))
                continue
            low, high = (pick(np.stack(edges), axis=0) for pick, edges in zip(
                (np.min, np.max), zip(*(ranges[name] for name in own), strict=True), strict=True
            ))  # fmt: skip
            scale = fit.fit(weight.astype(jnp.promote_types(weight.dtype, jnp.float32)), low, high).arrays()
            scales.append(scale["smooth_scale"])
            for name in own:
                schemes[name] = _without_transform(schemes[name], "divided by its scale")
                ranges[name] = tuple(edge / np.asarray(scales[-1]) for edge in ranges[name])
        scale = jnp.stack(scales) if stacked else scales[0]  # in, or layers in
        for maker in makers:
            _scale(at(model, maker).weight, 1 / scale[..., :, None])  # values are the rows of ([layers,] out, in)
            if at(model, maker).bias is not None:
                _scale(at(model, maker).bias, 1 / scale)
        for reader in readers:
            _scale(at(model, reader).weight, scale[..., None, :])
    return model, schemes, ranges


def _scale(variable: nnx.Variable, factors: jax.Array) -> None:
    """Multiply in at least float32, and keep the type."""
    variable[...] = (variable[...] * factors).astype(variable[...].dtype)


def _of_heads(fit: FitRotation, rotation: Rotation, features: int, heads: int) -> InputTransform:
    """One rotation for all heads."""
    signs = jnp.tile(fit.signs(features), heads) if rotation.signs else None  # features -> (heads features)
    return InputTransform(signs=signs, rotation=rotation)


def _rotate_outputs(layer: Linear, transform: InputTransform, rotated: np.ndarray) -> None:
    """y = W x + b becomes T y, in the blocks that `rotated` names."""
    layer.weight[...] = _where(rotated, _turned(layer.weight[...], transform, outputs=True), layer.weight[...])
    if layer.bias is not None:
        layer.bias[...] = _where(rotated, transform(layer.bias[...]), layer.bias[...])


def _rotate_inputs(layer: Linear, transform: InputTransform, rotated: np.ndarray) -> None:
    """The layer that does to T x what it did to x."""
    layer.weight[...] = _where(rotated, _turned(layer.weight[...], transform, outputs=False), layer.weight[...])


@functools.partial(jax.jit, static_argnames="outputs")
def _turned(weight: jax.Array, transform: InputTransform, *, outputs: bool) -> jax.Array:
    """A weight [[layers,] out, in] whose columns (or rows) are transformed, layer by layer, so that the float32
    temporaries are one layer's."""

    def one(matrix):
        return (transform(matrix.T).T if outputs else transform(matrix)).astype(matrix.dtype)

    return jax.lax.map(one, weight) if weight.ndim == 3 else one(weight)


def _where(rotated: np.ndarray, new: jax.Array, old: jax.Array) -> jax.Array:
    """New rows of a stack [layers, ...] where they are wanted, or all of an array outside stacks; in the old type."""
    if rotated.all():
        return new.astype(old.dtype)
    return jnp.where(rotated.reshape(-1, *(1,) * (old.ndim - 1)), new.astype(old.dtype), old)  # layers -> layers 1 ...


def _without_transform(scheme: LayerScheme, done: str) -> LayerScheme:
    """The scheme without rotation and scale, and who has `done` what they did."""
    kept = tuple(name for name in scheme.transforms if name not in ("rotation", "smooth_scale"))
    reason = f"{scheme.reason}; its input is {done} by the weights that make values"
    return dataclasses.replace(scheme, transforms=kept, rotation=None, reason=reason)
