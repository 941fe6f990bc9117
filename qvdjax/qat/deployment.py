"""From a trained model with learned quantizers to the quantized model that is stored and run."""

import functools

import jax

from qvdjax.errors import UserError
from qvdjax.nn import Attention, Execution, LayerScheme, QuantizedLinear, VideoModel
from qvdjax.nn.variables import dotted, iterate, replace, shallow_copy
from qvdjax.numerics import encode, sqnr_db
from qvdjax.qat import learned_clips
from qvdjax.qat.learned_linear import LearnedLinear
from qvdjax.qat.learned_weights import positive
from qvdjax.quantization import best_execution


def deploy(model: VideoModel, *, execution: Execution | None = None, recipe_name: str | None = None) -> VideoModel:
    """The model whose LearnedLinear layers are QuantizedLinear: the learned integers, scales, zero points and clips.

    It computes what the trained model computes (in float32: to rounding), is saved and loaded as any quantized model,
    and runs in simulated or integer execution. Fractional zero points stay as they are.

    Args:
        model: As trained; left as it is.
        execution: "integer", "simulate", or None for the device's best.
        recipe_name: Recorded in the model and its folder; None keeps the model's.

    Raises:
        UserError: A layer that still has an auxiliary module, whose part would be lost.
    """
    execution = execution or best_execution()[0]
    model = shallow_copy(model)
    if left := [dotted(path) for path, layer in iterate(model, LearnedLinear) if layer.auxiliary is not None]:
        raise UserError(
            "layers still have their auxiliary modules",
            remedy="let them decay to nothing, then take without_auxiliary(model)",
            items=left,
        )
    for path, layer in iterate(model, LearnedLinear):
        replace(model, path, quantized_linear(layer, execution))
    for _, layer in iterate(model, Attention):
        layer.execution = execution
    if recipe_name is not None:
        model.recipe_name = recipe_name
    return model


def quantized_linear(layer: LearnedLinear, execution: Execution) -> QuantizedLinear:
    """One layer, or a stack of them, with its codes."""
    scheme, clip = layer.scheme, layer.scheme.input_clip
    parts = {"weight": layer.weight[...]}
    if scheme.weight is not None:
        zero_point = None if layer.weight_zero_point is None else layer.weight_zero_point[...]
        parts = _encode_stack(layer.whole_weight(), layer.weight_scale[...], zero_point, scheme=scheme)
    if clip is not None:
        parts["input_clip"] = learned_clips.table(layer.clip_logits[...], clip)
    bias = None if layer.bias is None else layer.bias[...]
    return QuantizedLinear(bias=bias, role=layer.role, axes=layer.axes, scheme=scheme, execution=execution, **parts)


@functools.partial(jax.jit, static_argnames="scheme")
def _encode_stack(weight, scale, zero_point, *, scheme: LayerScheme) -> dict:
    """Layer by layer, so that the temporaries are one layer's."""

    def one(rows):
        weight, scale, zero_point = rows
        codes = encode(weight, scheme.weight.grid, positive(scale), zero_point)
        return {"weight": codes, "weight_sqnr_db": sqnr_db(weight, codes.dequantize())}

    rows = (weight, scale, zero_point)
    return one(rows) if weight.ndim == 2 else jax.lax.map(one, rows)
