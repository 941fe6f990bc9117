"""Do the layers of a quantized model compute the same in both executions?"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp

from qvdjax.kernels.convolve import mixes_first_axis_alone
from qvdjax.nn import QUANTIZED_LAYERS, Attention, QuantizedConv

_AS_IT_IS = contextlib.nullcontext()


def layer_differences(model, inputs) -> list[float]:
    """For every layer that multiplies codes, and attention that does, how far its two executions are apart.

    A whole model says less: one code that float32 rounding flips is a step of some 1/127 of a range, and a network of
    random weights makes it larger with every layer.

    Args:
        model: Quantized, at integer execution.
        inputs: Keyword arguments of its call.

    Returns:
        ||integer - simulated|| / ||simulated||, one a call of a layer.
    """
    differences = []

    def watched(call):
        def both(layer, *arrays):
            with mock.patch.object(layer, "implementation", "xla") if _convolves_codes(layer) else _AS_IT_IS:
                y = call(layer, *arrays)
            if _multiplies_codes(layer):
                with mock.patch.object(layer, "execution", "simulate"):
                    simulated = call(layer, *arrays)
                differences.append(float(jnp.linalg.norm(y - simulated) / jnp.linalg.norm(simulated)))
            return y

        return both

    with contextlib.ExitStack() as patches:
        for kind in (*QUANTIZED_LAYERS, Attention):
            patches.enter_context(mock.patch.object(kind, "__call__", watched(kind.__call__)))
        # Blocks of a scan too then meet arrays instead of tracers.
        patches.enter_context(jax.disable_jit())
        model(**inputs)
    return differences


def _convolves_codes(layer) -> bool:
    """Whether codes of a convolution can be multiplied, which on CPU are multiplied as floats where nobody asks."""
    if not isinstance(layer, QuantizedConv):
        return False
    return len(layer.kernel) < 3 or mixes_first_axis_alone(layer.kernel, layer.stride, layer.padding)


def _multiplies_codes(layer) -> bool:
    if isinstance(layer, Attention):
        return bool(layer.scheme.qk_bits or layer.scheme.pv_bits)
    return layer.codes is not None and layer.scheme.activation is not None
