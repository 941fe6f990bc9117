"""The outlier variant: the same function, heavy channels where real models have them, and only there."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from experiments.moving_shapes import outlier, train
from experiments.moving_shapes.outlier import outlier_variant
from models.pipeline import Pipeline
from models.unet_motion import UNetMotionModel
from qvdjax.errors import UserError
from qvdjax.nn import Conv, Linear
from qvdjax.nn.variables import iterate, own_shape

CONFIGS = {family: {**train.CONFIGS[family], "num_layers": 2} for family in ("wan", "cogvideox")}
CONFIGS["animatediff"] = train.CONFIGS["animatediff"]
_INNER = ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
SITES = {
    "wan": ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_out.0", "ffn.net.0.proj"),
    "cogvideox": ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj"),
    "animatediff": (
        *(f"attentions.0.{layer}" for layer in ("proj_in", *(f"transformer_blocks.0.{layer}" for layer in _INNER))),
        *(f"motion_modules.0.{layer}" for layer in ("proj_in", *(f"transformer_blocks.0.{layer}" for layer in _INNER))),
    ),
}
BEHIND_THE_NONLINEARITY = {"wan": "ffn.net.2", "cogvideox": "ff.net.2", "animatediff": "resnets.0.conv2"}
families = pytest.mark.parametrize("family", CONFIGS)


def random_model(family, dtype) -> nnx.Module:
    """Every parameter random, so that none is hidden behind a zero or a one."""
    model = models.build(CONFIGS[family], dtype=dtype)
    for number, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
        value, own = variable[...], own_shape(variable)
        scale = 1.0 / math.prod(own[1:]) ** 0.5 if len(own) > 1 else 0.1
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), value.shape, dtype)
        variable[...] = value + scale * noise
    return model


def inputs(dtype, model):
    keys = jax.random.split(jax.random.key(2), 2)
    latents = jax.random.normal(keys[0], (2, 3, 4, 6, model.config.latent_channels), dtype)
    context = jax.random.normal(keys[1], (2, 8, 64), dtype).at[:, 5:].set(0)
    return latents, jnp.array([30.0, 900.0], dtype), context


def relative(a, b) -> float:
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


@families
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_the_function_stays_the_same(family, dtype, tolerance):
    """The factors cancel exactly in the reals; what is left is rounding, 6e-8 or 1e-16 an operation, which
    two blocks and factors of 50 raise by one to three orders."""
    with jax.enable_x64(dtype == "float64"):
        model = random_model(family, jnp.dtype(dtype))
        variant = outlier_variant(model, seed=3)
        call = jax.jit(lambda model, *args: model(*args))
        given = inputs(dtype, model)
        one, other = call(model, *given), call(variant, *given)
        assert one.dtype == dtype
        assert relative(other, one) <= tolerance
        # The test can fail: a model with one factor left out is far off.
        site = next(layer for _, layer in iterate(variant, Linear) if layer.role == "value")
        site.weight[...] *= 2
        assert relative(call(variant, *given), one) > 1e-4


def channel_maxima(model, monkeypatch) -> dict[str, np.ndarray]:
    """|input| of every layer of the first block: the largest of each channel over batch and tokens."""
    seen = {}

    def watching(original):
        def watched(self, x):
            if id(self) in names:
                seen[names[id(self)]] = np.abs(np.asarray(x)).max(axis=tuple(range(x.ndim - 1)))
            return original(self, x)

        return watched

    block = model.stacks[0].block
    if not isinstance(model, UNetMotionModel):
        block = jax.tree.map(lambda leaf: leaf[0], block)
    names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(block)}
    stream, conditioning = model.embed(*inputs("float32", model))
    with monkeypatch.context() as patch:
        for kind in (Linear, Conv):
            patch.setattr(kind, "__call__", watching(kind.__call__))
        block(stream, conditioning)
    return seen


@families
def test_heavy_channels_are_where_they_are_said_to_be(family, monkeypatch):
    model = random_model(family, jnp.float32)
    ratio = lambda maxima: maxima.max() / np.median(maxima)  # noqa: E731
    before = channel_maxima(model, monkeypatch)
    after = channel_maxima(outlier_variant(model, channels=4), monkeypatch)
    assert set(SITES[family]) < set(before)
    for site in SITES[family]:
        # Factors of 10 to 50 on channels whose maxima differ by less than 5 among themselves.
        assert ratio(before[site]) < 5, site
        assert ratio(after[site]) > 8, site
        assert (after[site] > 5 * np.median(after[site])).sum() <= 4 + 1, site
    behind = BEHIND_THE_NONLINEARITY[family]
    np.testing.assert_allclose(after[behind], before[behind], rtol=1e-3)


@families
def test_the_seed_chooses_the_channels_and_the_model_stays_as_it_is(family):
    model = random_model(family, jnp.float32)
    before = jax.tree.map(np.asarray, nnx.state(model))
    one, same, other = (outlier_variant(model, seed=s) for s in (0, 0, 1))
    weight = lambda model: next(np.asarray(a.weight[...]) for _, a in iterate(model, Linear) if a.role == "query")  # noqa: E731
    assert (weight(one) == weight(same)).all()
    assert (weight(one) != weight(other)).any()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))


@pytest.mark.parametrize(("family", "field"), [("wan", "cross_attn_norm"), ("cogvideox", "norm_elementwise_affine")])
def test_models_without_an_affine_norm_are_refused(family, field):
    model = models.build({**CONFIGS[family], field: False, "num_layers": 1})
    with pytest.raises(UserError, match=field):
        outlier_variant(model)


def test_the_command_writes_a_bench_folder(tmp_path):
    model = random_model("wan", jnp.float32)
    train.save_folder(model, tmp_path / "plain")
    outlier.main([str(tmp_path / "plain"), str(tmp_path / "heavy"), "--seed", "3"])
    heavy = models.load(tmp_path / "heavy")
    given = inputs("float32", model)
    np.testing.assert_allclose(heavy(*given), model(*given), rtol=1e-2, atol=1e-4)
    assert Pipeline.load(tmp_path / "heavy").words == train.pipeline().words
