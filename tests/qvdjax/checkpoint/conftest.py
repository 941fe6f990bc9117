"""A small model of all that the mapping knows: stacks, a lone block, packed and whole codes, arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvdjax.checkpoint import save_variables
from qvdjax.checkpoint.folder import WEIGHTS
from qvdjax.nn import Linear, Param, Stack, VideoModel
from qvdjax.nn.variables import Codes, Scale, Statistic


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    layers: int = 3

    def to_dict(self):
        return {"_class_name": "Tiny", "layers": self.layers}


class Quantized(nnx.Module):
    """The variables of a quantized layer, without its arithmetic."""

    def __init__(self, rows, width, bits):
        codes = jnp.zeros((rows, width), jnp.int4 if bits <= 4 else jnp.int8)
        self.codes = Codes(codes, axes=("mlp", "embed"), bits=bits)
        self.weight_scale = Scale(jnp.ones((rows, 1)), axes=("mlp", None))
        self.weight_sqnr_db = Statistic(jnp.zeros(()), axes=())
        self.bias = Param(jnp.zeros((rows,)), axes=("mlp",))


class Block(nnx.Module):
    def __init__(self, bits, *, key):
        self.to_q = Quantized(6, 11, bits)  # 11: words that end within a code
        self.table = Param(jnp.zeros((1, 2, 4)), axes=(None, None, "embed"), keep_float32=True)
        options = {"role": "feed_forward_in", "axes": ("mlp", "embed"), "key": key}
        self.ffn = nnx.Dict({"net": nnx.Dict({"0": Linear(4, 10, **options)})})


class Tiny(VideoModel):
    def __init__(self, config, *, key, bits=(4, 8, 3)):
        keys = jax.random.split(key, 6)
        self.config = config
        make = lambda b: jax.vmap(lambda k: Block(b, key=k))  # noqa: E731
        self.stacks = nnx.List([
            Stack(make(bits[0])(jax.random.split(keys[0], 2)), prefix="blocks", start=0, count=2),
            Stack(make(bits[1])(jax.random.split(keys[1], 3)), prefix="blocks", start=2, count=3),
            Stack(Block(bits[2], key=keys[2]), prefix="mid_block"),
        ])  # fmt: skip
        self.proj_out = Linear(4, 6, role="head", axes=(None, "embed"), key=keys[3])
        self.counts = nnx.Variable(jnp.arange(3, dtype=jnp.int32), axes=(None,))


def bits_of(array):
    """An array's exact content, of any type."""
    return str(array.dtype), array.shape, np.asarray(array).tobytes()


def equal_models(one, other):
    """Whether two models hold the same arrays under the same paths, bit for bit."""
    flat = [dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other)]
    content = [{path: bits_of(v.get_value()) for path, v in state.items()} for state in flat]
    return content[0] == content[1]


def random_values(path, variable, rng):
    """Values for one abstract variable; drawn by NumPy, so that nothing is compiled."""
    shape, dtype = variable.get_value().shape, variable.get_value().dtype
    if isinstance(variable, Codes):
        half = 1 << (variable.get_metadata()["bits"] - 1)
        return rng.integers(-half, half, shape).astype(dtype)
    if isinstance(variable, Statistic):
        return np.full(shape, np.inf, dtype)
    return (rng.standard_normal(shape) * 10).astype(dtype)


@functools.cache
def make_tiny(bits=(4, 8, 3)):
    """(model, abstract model)."""
    abstract = jax.eval_shape(lambda: Tiny(TinyConfig(), key=jax.random.key(0), bits=bits))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)
    leaves = [(p, v.replace(jnp.asarray(random_values(p, v, rng)))) for p, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves)), abstract


make_tiny.equal = equal_models


@pytest.fixture
def tiny():
    """tiny(bits) -> (model, abstract model), the same each time; tiny.equal(one, other)."""
    return make_tiny


@pytest.fixture(scope="session")
def corruptible(tmp_path_factory):
    """(folder, model, abstract model, bytes of its weights, equal); tests write other bytes there."""
    model, abstract = make_tiny()
    path = tmp_path_factory.mktemp("corruptible") / "model"
    save_variables(model, path, {})
    return path, model, abstract, (path / WEIGHTS).read_bytes(), equal_models
