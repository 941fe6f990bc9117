"""Computing in a narrower type than the parameters are kept in."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import PerCall, Scale
from qvdjax.qat import FakeQuantizedLinear, LearnedLinear

ROUNDED = (FakeQuantizedLinear, LearnedLinear)
"""Layers that round their weight themselves, from its float32 value: rounding a rounded weight moves codes."""


def computing_in(model: nnx.Module, dtype: str) -> nnx.Module:
    """The model with its floating variables in `dtype`; gradients pass the cast.

    Left as they are: what a loader keeps in float32 too (`keep_float32`), the weights of layers that round them
    themselves, scales and zero points of stored codes, and what is put into layers for one call (gates of low-rank
    modules).
    """
    own = {id(layer.weight) for _, layer in nnx.iter_modules(model) if isinstance(layer, ROUNDED)}

    def one(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        keep = id(variable) in own or isinstance(variable, PerCall | Scale)
        keep = keep or variable.get_metadata().get("keep_float32", False)
        if keep or not jnp.issubdtype(value.dtype, jnp.floating):
            return variable
        return variable.replace(value.astype(dtype))

    return jax.tree.map(one, model, is_leaf=lambda node: isinstance(node, nnx.Variable))
