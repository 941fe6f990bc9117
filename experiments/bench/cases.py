"""What is timed: one linear layer, one attention, one block and one step, in full precision and quantized."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import models
import qvdjax
from experiments.bench.ceilings import Work, attention_work, block_work, linear_work, step_work
from experiments.bench.shapes import Shape
from qvdjax import recipes
from qvdjax.nn import AttentionScheme, Codes, VideoModel, dot_product_attention, quantized_attention

# What jax raises when a device lacks the memory or an operation.
DEVICE_ERRORS = (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError, ValueError)
Failed = Callable[[str, Exception], None]
COMPARED_QUERIES = 256  # of an attention: float32 scores of all queries would not fit


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        label: "bfloat16", "rtn-w8a8", "int8-qk", ...
        function: What is jitted, and `arguments` what it is called with.
        quantized: Kinds of product that are quantized, for the ceiling: of "linear", "qk", "pv".
        weight_bytes: Its weights by their logical bits.
    """

    label: str
    function: Callable
    arguments: tuple[Any, ...]
    quantized: tuple[str, ...] = ()
    weight_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation in several variants, of which the first is the full-precision reference.

    Attributes:
        kind: linear, attention, block or step.
        work: Operations of its matrix products.
        truth: Makes what outputs are compared with before anything is timed; None takes the reference's
            own output.
        compared: The part of an output that is compared.
    """

    kind: str
    shape: Shape
    work: Work
    variants: list[Variant]
    truth: Callable[[], jax.Array] | None = None
    compared: Callable[[jax.Array], jax.Array] = lambda output: output


def cases(
    shape: Shape, recipe_names: Sequence[str], dtype, *, attention_in_block: bool, failed: Failed
) -> Iterator[Case]:
    """The layer, attention and block of a shape, with random weights and inputs.

    Args:
        recipe_names: Quantizations.
        dtype: Of the full-precision reference.
        attention_in_block: Also a block whose QK products are int8, beside the first recipe's linear layers.
        failed: Called with a recipe and the reason where the device cannot make its arrays.
    """
    float_model = _model(shape, dtype, layers=1)
    stream, conditioning = jax.jit(lambda m, *inputs: m.embed(*inputs))(float_model, *_inputs(shape, dtype))
    # The stream of freshly made embedders is small and alike; blocks in a trained model see values of order
    # one.
    stream = jax.random.normal(jax.random.key(1), stream.shape, jnp.float32).astype(dtype)
    wanted = {name: (recipes.get(name), ("linear",)) for name in recipe_names}
    if attention_in_block and recipe_names:
        with_attention = recipes.get(recipe_names[0], attention_qk_bits=8)
        wanted[f"{recipe_names[0]}+int8-qk"] = with_attention, ("linear", "qk")
    blocks = {}
    for name, (recipe, _) in wanted.items():
        try:
            blocks[name] = _first_block(_quantized(float_model, recipe))
        except DEVICE_ERRORS as error:
            failed(name, error)
    float_block = _first_block(float_model)

    yield _linear(shape, float_block, {n: b for n, b in blocks.items() if n in recipe_names}, stream)
    yield _attention(shape, dtype)
    call = lambda block, stream, conditioning: block(stream, conditioning)  # noqa: E731
    variants = [Variant(_name(dtype), call, (float_block, stream, conditioning), (), logical_bytes(float_block))]
    for name, block in blocks.items():
        variants.append(Variant(name, call, (block, stream, conditioning), wanted[name][1], logical_bytes(block)))
    yield Case("block", shape, block_work(shape), variants)


def step_case(shape: Shape, recipe_names: Sequence[str], dtype, failed: Failed) -> Case:
    """One forward pass of the whole model: a denoising step without guidance. `failed` as in `cases`."""
    float_model, inputs = _model(shape, dtype), _inputs(shape, dtype)
    call = lambda model, *inputs: model(*inputs)  # noqa: E731
    variants = [Variant(_name(dtype), call, (float_model, *inputs), (), logical_bytes(float_model))]
    for name in recipe_names:
        try:
            model = _quantized(float_model, recipes.get(name))
        except DEVICE_ERRORS as error:
            failed(name, error)
            continue
        variants.append(Variant(name, call, (model, *inputs), ("linear",), logical_bytes(model)))
    return Case("step", shape, step_work(shape), variants)


def step_bytes(shape: Shape, recipe_names: Sequence[str], dtype) -> int:
    """Bytes that the weights of a step's variants take together, by logical bits."""
    float_model = jax.eval_shape(lambda: _built(shape, dtype, shape.layers))
    quantized = [jax.eval_shape(lambda m, n=n: _quantize(m, recipes.get(n)), float_model) for n in recipe_names]
    return sum(logical_bytes(model) for model in (float_model, *quantized))


def logical_bytes(module: nnx.Module) -> int:
    """Bytes of all Variables: codes by their logical bits, everything else by its type."""
    bits = 0
    for variable in jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        array = variable.get_value()
        width = variable.get_metadata("bits") if isinstance(variable, Codes) else array.dtype.itemsize * 8
        bits += array.size * width
    return -(-bits // 8)


def _linear(shape: Shape, float_block, blocks: dict, stream) -> Case:
    """The first layer of the feed-forward, on all video tokens."""
    layer_of = lambda block: block.ffn.net["0"]["proj"]  # noqa: E731
    call = lambda layer, x: layer(x)  # noqa: E731
    reference = layer_of(float_block)
    variants = [Variant(_name(stream.dtype), call, (reference, stream), (), logical_bytes(reference))]
    for name, block in blocks.items():
        layer = layer_of(block)
        variants.append(Variant(name, call, (layer, stream), ("linear",), logical_bytes(layer)))

    def truth():
        weight, x = (a.astype(jnp.float32) for a in (reference.weight[...], stream))
        product = jnp.matmul(x, weight.T, precision=jax.lax.Precision.HIGHEST)
        return product + reference.bias[...].astype(jnp.float32)

    return Case("linear", shape, linear_work(shape.tokens, shape.width, shape.hidden), variants, truth)


def _attention(shape: Shape, dtype) -> Case:
    """Self-attention over all video tokens, without its projections."""
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    query, key, value = (jax.random.normal(jax.random.key(k), size, jnp.float32).astype(dtype) for k in range(3))
    variants = [Variant(_name(dtype), dot_product_attention, (query, key, value))]
    if jax.default_backend() != "cpu":  # what the quantized products, which have no kernel yet, compare with
        plain = lambda q, k, v: dot_product_attention(q, k, v, implementation="xla")  # noqa: E731
        variants.append(Variant(f"{_name(dtype)}-without-kernel", plain, (query, key, value)))
    for label, scheme, kinds in (
        ("int8-qk", AttentionScheme(qk_bits=8), ("qk",)),
        ("int8-qk-pv", AttentionScheme(qk_bits=8, pv_bits=8), ("qk", "pv")),
    ):
        call = lambda q, k, v, s=scheme: quantized_attention(q, k, v, scheme=s, execution="integer")  # noqa: E731
        variants.append(Variant(label, call, (query, key, value), kinds))

    def compared(output):
        return output[:, :COMPARED_QUERIES]

    def truth():
        q, k, v = (a.astype(jnp.float32) for a in (compared(query), key, value))
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda *a: dot_product_attention(*a, implementation="xla"))(q, k, v)

    return Case("attention", shape, attention_work(shape.tokens, shape.tokens, shape.width), variants, truth, compared)


def _built(shape: Shape, dtype, layers: int) -> VideoModel:
    return models.build({**shape.config, "num_layers": layers}, dtype=dtype)


def _model(shape: Shape, dtype, layers: int | None = None) -> VideoModel:
    return jax.jit(lambda: _built(shape, dtype, layers or shape.layers))()


def _quantize(model: VideoModel, recipe) -> VideoModel:
    return qvdjax.quantize(model, recipe, execution="integer")


def _quantized(model: VideoModel, recipe) -> VideoModel:
    """Quantized in one program, so that no float32 copy of the weights is made on the way."""
    return jax.jit(lambda m: _quantize(m, recipe))(model)


def _first_block(model: VideoModel) -> nnx.Module:
    """The block of the first layer, without the layer axis."""
    return model.stacks[0].layer(0)


def _inputs(shape: Shape, dtype) -> tuple[jax.Array, ...]:
    """Latents (1, frames, height, width, channels), timestep (1,), context (1, tokens, dim)."""
    latents, context = jax.random.split(jax.random.key(2))
    size = (1, shape.text_tokens, shape.config["text_dim"])
    return (
        jax.random.normal(latents, (1, *shape.latents), jnp.float32),
        jnp.full((1,), 500.0),
        jax.random.normal(context, size, jnp.float32).astype(dtype),
    )


def _name(dtype) -> str:
    return jnp.dtype(dtype).name
