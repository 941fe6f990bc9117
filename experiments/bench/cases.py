"""What is timed: a linear layer, an attention, a block, a step and a video, in full precision and quantized."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import models
import qvdjax
from experiments.bench.ceilings import Work, attention_work, block_work, linear_work, step_work
from experiments.bench.rivals import Rival, attention_rivals, linear_rivals, step_rivals
from experiments.bench.shapes import Shape
from models.scheduler import PUBLISHED
from qvdjax import kernels, recipes
from qvdjax.diffusion import initial_noise, sample
from qvdjax.nn import AttentionScheme, Codes, Linear, VideoModel, dot_product_attention, quantized_attention
from qvdjax.numerics import QTensor
from qvdjax.numerics.float8 import FLOAT8
from qvdjax.ptq.layers import quantize_layer
from qvdjax.recipes import Recipe

# What jax raises when a device lacks the memory or an operation.
DEVICE_ERRORS = (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError, ValueError)
Failed = Callable[[str, Exception], None]
COMPARED_QUERIES = 256  # of an attention: float32 scores of all queries would not fit
ATTENTION = "+int8-attention"
"""Behind a recipe's name: the same, its attention's products quantized too."""
SAMPLE_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        label: "bfloat16", "rtn-w8a8", "int8-qk", ...
        function: What is jitted, and `arguments` what it is called with.
        quantized: Kinds of product that are of integers, for the ceiling: of "linear", "qk", "pv", "convolution".
        weight_bytes: Its weights by their logical bits.
        choice: What computes it, and why, where that is one kernel's choice.
    """

    label: str
    function: Callable
    arguments: tuple[Any, ...]
    quantized: tuple[str, ...] = ()
    weight_bytes: int = 0
    choice: kernels.Choice | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation in several variants, of which the first is the full-precision reference.

    Attributes:
        kind: linear, attention, block, step or sample.
        work: Operations of its matrix products.
        truth: Makes what outputs are compared with before anything is timed; None takes the reference's
            own output.
        compared: The part of an output that is compared.
        rivals: Other programs' ways to compute it, timed in the same turns.
    """

    kind: str
    shape: Shape
    work: Work
    variants: list[Variant]
    truth: Callable[[], jax.Array] | None = None
    compared: Callable[[jax.Array], jax.Array] = lambda output: output
    rivals: tuple[Rival, ...] = ()


def linear_case(shape: Shape, recipe_names: Sequence[str], dtype, failed: Failed) -> Case:
    """The first layer of a feed-forward, on all tokens, with its bias. `failed` is called with a recipe and the reason
    where the device cannot make its arrays."""
    rows, inputs, outputs = shape.linear_size
    x = jax.random.normal(jax.random.key(1), (1, rows, inputs), jnp.float32).astype(dtype)
    reference = jax.jit(lambda: _linear(inputs, outputs, dtype))()
    call = lambda layer, x: layer(x)  # noqa: E731
    variants = [Variant(_name(dtype), call, (reference, x), (), logical_bytes(reference))]
    for name in recipe_names:
        scheme = scheme_of(recipes.get(name))
        try:
            layer = jax.jit(lambda layer, s=scheme: quantize_layer(layer, s, execution="integer"))(reference)
        except DEVICE_ERRORS as error:
            failed(name, error)
            continue
        choice = None
        if scheme.weight is not None and scheme.activation is not None and scheme.activation.dynamic:
            choice = kernels.quantized_linear_choice(x, layer.qweight, scheme.activation)
        variants.append(Variant(name, call, (layer, x), ("linear",), logical_bytes(layer), choice))

    def truth():
        weight, wide = (a.astype(jnp.float32) for a in (reference.weight[...], x))
        return jnp.matmul(wide, weight.T, precision=jax.lax.Precision.HIGHEST)

    rivals = linear_rivals(rows, inputs, outputs, dtype)
    return Case("linear", shape, linear_work(rows, inputs, outputs), variants, truth, rivals=rivals)


def attention_case(shape: Shape, dtype) -> Case:
    """Self-attention, without its projections."""
    size = shape.attention_size
    query, key, value = (jax.random.normal(jax.random.key(k), size, jnp.float32).astype(dtype) for k in range(3))
    best = kernels.attention_choice(query, key)
    variants = [Variant(_name(dtype), dot_product_attention, (query, key, value), choice=best)]
    if jax.default_backend() != "cpu":  # what quantized products without a kernel compare with
        plain = lambda q, k, v: dot_product_attention(q, k, v, implementation="xla")  # noqa: E731
        variants.append(Variant(f"{_name(dtype)}-without-kernel", plain, (query, key, value)))
    for label, scheme, kinds in (
        ("int8-qk", AttentionScheme(qk_bits=8), ("qk",)),
        ("int8-qk-pv", AttentionScheme(qk_bits=8, pv_bits=8), ("qk", "pv")),
        ("float8-qk-pv", AttentionScheme(qk_bits=8, pv_bits=8, codebook=FLOAT8), ("qk", "pv")),
    ):
        variants += _quantized_attentions(label, scheme, kinds, (query, key, value))

    def compared(output):
        return output[:, :COMPARED_QUERIES]

    def truth():
        q, k, v = (a.astype(jnp.float32) for a in (compared(query), key, value))
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda *a: dot_product_attention(*a, implementation="xla"))(q, k, v)

    batch, tokens, heads, head_dim = size
    work = attention_work(tokens, tokens, heads * head_dim) * batch
    return Case("attention", shape, work, variants, truth, compared, attention_rivals(size, dtype))


def _quantized_attentions(label: str, scheme: AttentionScheme, kinds, arrays) -> Iterator[Variant]:
    """What the dispatcher chooses, and beside it the GPU's kernel, which it does not choose before it was timed."""

    def call(implementation=None):
        return lambda *a: quantized_attention(*a, scheme=scheme, execution="integer", implementation=implementation)

    bits = {name: getattr(scheme, name) for name in ("qk_bits", "pv_bits", "pv_block", "codebook")}
    choice = kernels.quantized_attention_choice(*arrays[:2], **bits)
    yield Variant(label, call(), arrays, kinds, choice=choice)
    for name, short in (("mosaic_gpu", "mosaic"), ("cudnn", "cudnn")):  # those that are run by name alone
        if name not in dict(choice.refused):
            asked = kernels.quantized_attention_choice(*arrays[:2], **bits, asked=name)
            yield Variant(f"{label}-{short}", call(name), arrays, kinds, choice=asked)


def block_case(shape: Shape, recipe_names: Sequence[str], dtype, failed: Failed) -> Case:
    """The first block of a transformer, on a stream of numbers of order one. `failed` as in `linear_case`."""
    float_model, inputs = _model(shape, dtype, layers=1), _inputs(shape, dtype)
    stream, conditioning = jax.jit(lambda m, inputs: m.embed(**inputs))(float_model, inputs)
    # The stream of freshly made embedders is small and alike; blocks in a trained model see values of order one.
    leaves, tree = jax.tree.flatten(stream)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    random = [jax.random.normal(k, a.shape, jnp.float32).astype(a.dtype) for k, a in zip(keys, leaves, strict=True)]
    stream = jax.tree.unflatten(tree, random)
    call = lambda block, stream, conditioning: jax.tree.leaves(block(stream, conditioning))[0]  # noqa: E731
    block = _first_block(float_model)
    variants = [Variant(_name(dtype), call, (block, stream, conditioning), (), logical_bytes(block))]
    for name, recipe, kinds in _recipes(recipe_names):
        try:
            block = _first_block(_quantized(float_model, recipe))
        except DEVICE_ERRORS as error:
            failed(name, error)
            continue
        variants.append(Variant(name, call, (block, stream, conditioning), kinds, logical_bytes(block)))
    return Case("block", shape, block_work(shape), variants)


def step_case(shape: Shape, recipe_names: Sequence[str], dtype, failed: Failed) -> Case:
    """One forward pass of the whole model: a denoising step without guidance. `failed` as in `linear_case`."""
    call = lambda model, inputs: model(**inputs)  # noqa: E731
    inputs = _inputs(shape, dtype)
    variants = [
        Variant(name, call, (model, inputs), kinds, logical_bytes(model))
        for name, model, kinds in _models(shape, recipe_names, dtype, failed)
    ]
    return Case("step", shape, step_work(shape), variants, rivals=step_rivals(shape, dtype))


def sample_case(shape: Shape, recipe_names: Sequence[str], dtype, failed: Failed) -> Case:
    """Latents from noise: `SAMPLE_STEPS` guided steps with the family's own solver, both branches one after the other,
    and, beside them, in one batch. `failed` as in `linear_case`."""
    defaults = PUBLISHED[models.family_of(shape.config).name]
    inputs = _inputs(shape, dtype)
    context = inputs.pop("context")
    del inputs["timestep"]
    noise = initial_noise([0], inputs.pop("latents").shape[1:])
    guidance = defaults.guidance_scale if "guidance" not in inputs else 1.0  # a distilled model makes one pass

    def call(doubled):
        return lambda model, noise, context, conditions: sample(
            model, context, jnp.zeros_like(context), noise=noise, solver=defaults.solver, steps=SAMPLE_STEPS,
            guidance_scale=guidance, doubled_batch=doubled, **conditions,
        ).latents  # fmt: skip

    variants = []
    for name, model, kinds in _models(shape, recipe_names, dtype, failed):
        for label, doubled in ((name, False), (f"{name}+one-batch", True))[: 1 if guidance == 1 else 2]:
            arguments = (model, noise, context, inputs)
            variants.append(Variant(label, call(doubled), arguments, kinds, logical_bytes(model)))
    passes = SAMPLE_STEPS * (1 if guidance == 1 else 2)
    return Case("sample", shape, step_work(shape) * passes, variants)


def step_bytes(shape: Shape, recipe_names: Sequence[str], dtype) -> int:
    """Bytes that the weights of a step's variants take together, by logical bits."""
    float_model = jax.eval_shape(lambda: _built(shape, dtype, None))
    chosen = [recipe for _, recipe, _ in _recipes(recipe_names)]
    quantized = [jax.eval_shape(lambda m, r=r: _quantize(m, r), float_model) for r in chosen]
    return sum(logical_bytes(model) for model in (float_model, *quantized))


def logical_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree: codes by their logical bits, everything else by its type."""
    bits = 0
    for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        array = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        width = leaf.get_metadata("bits") if isinstance(leaf, Codes) else array.dtype.itemsize * 8
        bits += array.size * width
    return -(-bits // 8)


def _recipes(names: Sequence[str]) -> list[tuple[str, Recipe, tuple[str, ...]]]:
    """Every recipe, and the first with attention quantized too where a kernel may pay: (label, recipe, what it
    quantizes)."""
    kinds = ("linear", "convolution") if _convolves_integers() else ("linear",)
    chosen = [(name, recipes.get(name), kinds) for name in names]
    if names and jax.default_backend() != "cpu":
        both = recipes.get(names[0], attention_qk_bits=8, attention_pv_bits=8)
        chosen.append((names[0] + ATTENTION, both, (*kinds, "qk", "pv")))
    return chosen


def _convolves_integers() -> bool:
    """Whether this device has convolutions of int8 that are worth it: else the same integers are floats."""
    codes, scale = (jax.ShapeDtypeStruct((1,) * 4, dtype) for dtype in (jnp.int8, jnp.float32))
    weight = QTensor(jax.ShapeDtypeStruct((1, 9), jnp.int8), jax.ShapeDtypeStruct((1, 1), jnp.float32), None, 8)
    choice = kernels.quantized_convolution_choice(
        QTensor(codes, scale, None, 8), weight, kernel=(3, 3), stride=(1, 1), padding=((1, 1),) * 2, dtype=jnp.float32
    )
    return choice.implementation == "xla"


def _models(shape: Shape, names: Sequence[str], dtype, failed: Failed):
    """(label, model, what it quantizes), the full-precision one first."""
    float_model = _model(shape, dtype)
    yield _name(dtype), float_model, ()
    for name, recipe, kinds in _recipes(names):
        try:
            model = _quantized(float_model, recipe)
        except DEVICE_ERRORS as error:
            failed(name, error)
            continue
        yield name, model, kinds


def scheme_of(recipe: Recipe):
    """What a recipe makes of the first layer of a feed-forward."""
    return next(rule.scheme for rule in recipe.rules if "feed_forward_in" in (rule.roles or ()))


def _linear(inputs: int, outputs: int, dtype) -> Linear:
    return Linear(
        inputs, outputs, role="feed_forward_in", axes=("mlp", "embed"), key=jax.random.key(0), dtype=dtype, bias=True
    )


def _built(shape: Shape, dtype, layers: int | None) -> VideoModel:
    if layers is None or shape.is_unet:
        return models.build(shape.config, dtype=dtype)
    kinds = [name for name in ("num_layers", "num_single_layers") if hasattr(shape.parsed, name)]
    return models.build({**shape.config, **dict.fromkeys(kinds, layers)}, dtype=dtype)


def _model(shape: Shape, dtype, layers: int | None = None) -> VideoModel:
    return jax.jit(lambda: _built(shape, dtype, layers))()


def _quantize(model: VideoModel, recipe: Recipe) -> VideoModel:
    return qvdjax.quantize(model, recipe, execution="integer")


def _quantized(model: VideoModel, recipe: Recipe) -> VideoModel:
    """Quantized in one program, so that no float32 copy of the weights is made on the way."""
    return jax.jit(lambda m: _quantize(m, recipe))(model)


def _first_block(model: VideoModel) -> nnx.Module:
    """The block of the first layer, without the layer axis."""
    return model.stacks[0].layer(0)


def _inputs(shape: Shape, dtype) -> dict[str, jax.Array]:
    """Latents (1, frames, height, width, channels), timestep (1,), context (1, tokens, dim) and the family's further
    inputs by name."""
    latents, context, rest = jax.random.split(jax.random.key(2), 3)
    parsed = shape.parsed
    random = lambda key, *size: jax.random.normal(key, (1, *size), jnp.float32)  # noqa: E731
    # Texts without padding: a mask would say so and nothing else.
    conditions = {name: random(rest, *size) for name, size in parsed.conditions.items() if name.count("mask") == 0}
    return {
        "latents": random(latents, *shape.latents), "timestep": jnp.full((1,), 500.0),
        "context": random(context, shape.text_tokens, parsed.text_dim).astype(dtype), **conditions,
    }  # fmt: skip


def _name(dtype) -> str:
    return jnp.dtype(dtype).name
