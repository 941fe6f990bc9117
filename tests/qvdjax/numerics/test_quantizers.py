"""Properties of grids, ranges, QTensor and fake quantization."""

import dataclasses

import chex
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qvdjax.numerics import (
    BITS,
    Grid,
    Quantizer,
    encode,
    fake_quantize,
    fake_quantize_dynamic,
    quantize,
    sqnr_db,
)
from qvdjax.numerics.qtensor import storage_dtype
from qvdjax.numerics.refinement import refined

ROWS, WIDTH = 3, 12

bits = st.sampled_from(list(BITS))
finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
matrices = arrays.arrays(np.float32, (2, ROWS, WIDTH), elements=finite)


@st.composite
def quantizers(draw, range_methods=("minmax", "search", "refine")):
    """Any quantizer that fits the matrices of this file."""
    granularity = draw(st.sampled_from(["tensor", "channel", "token", "group"]))
    return Quantizer(
        draw(bits), draw(st.booleans()), granularity, 4 if granularity == "group" else None,
        range_method=draw(st.sampled_from(range_methods)),
    )  # fmt: skip


@given(matrices, quantizers())
@settings(max_examples=60)
def test_invariants_of_a_qtensor(x, quantizer):
    q = quantize(jnp.asarray(x), quantizer)
    groups = WIDTH // quantizer.group_size if quantizer.group_size else 1
    rows = 1 if quantizer.granularity == "tensor" else ROWS
    codes = np.asarray(q.codes.astype(jnp.int8))

    assert q.codes.dtype == storage_dtype(quantizer.bits)  # 1
    assert codes.min() >= -(2 ** (q.bits - 1))
    assert codes.max() <= 2 ** (q.bits - 1) - 1
    chex.assert_shape(q.scale, (2, rows, groups))  # 2
    assert q.scale.dtype == jnp.float32
    assert bool(jnp.isfinite(q.scale).all() & (q.scale > 0).all())
    assert (q.zero_point is None) == quantizer.symmetric  # 3
    if q.zero_point is not None:
        chex.assert_equal_shape([q.scale, q.zero_point])
    real = q.dequantize()  # 4
    chex.assert_equal_shape([real, q.codes])
    again = encode(real, q.grid, q.scale, q.zero_point)  # 5
    chex.assert_trees_all_equal(again.codes.astype(jnp.int8), q.codes.astype(jnp.int8))
    zero_points = 0 if q.zero_point is None else 32 * q.zero_point.size
    assert q.logical_bits == x.size * q.bits + 32 * q.scale.size + zero_points  # 6


@given(matrices, quantizers(range_methods=("minmax",)))
@settings(max_examples=60)
def test_min_max_errs_by_at_most_half_a_step(x, quantizer):
    x = jnp.asarray(x)
    q = quantize(x, quantizer)
    step = np.repeat(np.asarray(q.scale), WIDTH // q.groups, axis=-1)
    # Half a step. A float32 quotient, and a zero point rounded to a code, may put a value at the edge of the range
    # up to another half step off in the asymmetric grid.
    allowed = (0.5 if quantizer.symmetric else 1.0) * step * (1 + 1e-5) + 1e-30
    assert (np.abs(np.asarray(q.dequantize() - x)) <= allowed).all()


def test_textbook_codes():
    x = jnp.array([[-7.0, -2.8, 0.0, 2.5, 3.5, 7.0]])
    symmetric = quantize(x, Quantizer(4))
    assert symmetric.scale.item() == 1
    assert symmetric.codes.astype(jnp.int8).tolist() == [[-7, -3, 0, 2, 4, 7]]  # halves round to even codes
    x = jnp.array([[0.0, 1.0, 3.0]])
    asymmetric = quantize(x, Quantizer(2, symmetric=False))
    assert asymmetric.codes.astype(jnp.int8).tolist() == [[-2, -1, 1]]  # 0, 1 and 3, minus 2
    assert asymmetric.zero_point.item() == -2


@given(matrices, quantizers(range_methods=("search",)))
@settings(max_examples=25)
def test_search_is_never_worse_than_min_max(x, quantizer):
    x = jnp.asarray(x)
    plain = Quantizer(quantizer.bits, quantizer.symmetric, quantizer.granularity, quantizer.group_size)
    searched, whole = (float((jnp.abs(quantize(x, q).dequantize() - x) ** 2.4).sum()) for q in (quantizer, plain))
    assert searched <= whole * (1 + 1e-5)  # float32 sums of equal terms in another order


@given(matrices, quantizers(range_methods=("refine",)))
@settings(max_examples=25)
def test_refinement_is_never_worse_than_search(x, quantizer):
    x = jnp.asarray(x)
    searched = dataclasses.replace(quantizer, range_method="search")
    error, before = (float(jnp.square(quantize(x, q).dequantize() - x).sum()) for q in (quantizer, searched))
    assert error <= before * (1 + 1e-5)  # float32 sums of equal terms in another order


def test_refinement_gains_on_rows_like_those_of_weights():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((64, 512)), jnp.float32)
    error = {
        method: float(jnp.square(quantize(x, Quantizer(4, False, range_method=method)).dequantize() - x).sum())
        for method in ("minmax", "search", "refine")
    }
    assert error["refine"] < error["search"] < error["minmax"]


def test_a_turn_of_refinement_is_least_squares():
    """One value off the grid: the first turn's scale and zero point by hand."""
    x = jnp.asarray([[[0.0, 1.0, 2.0, 3.4]]])
    scale, zero_point = jnp.full((1, 1, 1), 1.0), jnp.full((1, 1, 1), -2.0)
    total = lambda a: a.sum(axis=-1, keepdims=True)  # noqa: E731
    best, zero = refined(x, Quantizer(2, symmetric=False).grid, scale, zero_point, total)
    # Codes -2 .. 1 stand for 0 .. 3: <q - z, x> / <q - z, q - z> = (1 + 4 + 10.2) / 14; rounding changes no code.
    assert best.item() == pytest.approx(15.2 / 14, rel=1e-6)
    assert zero.item() == -2


def test_search_gives_up_an_outlier():
    """A range that covers one far value wastes most codes; the searched one clips it."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4096)), jnp.float32).at[0, 0].set(30.0)
    searched = Quantizer(4, range_method="search", range_norm=2.0)
    assert float(quantize(x, searched).scale[0, 0]) < 0.5 * float(quantize(x, Quantizer(4)).scale[0, 0])


@given(matrices, quantizers(range_methods=("minmax",)))
@settings(max_examples=40)
def test_fake_quantization_equals_codes_dequantized(x, quantizer):
    x = jnp.asarray(x)
    q = quantize(x, quantizer)
    fake = fake_quantize(x, q.grid, q.scale, q.zero_point)
    # The same float32 operations but for the straight-through sum x + (round(x) - x), exact for codes up to 2**8.
    chex.assert_trees_all_close(fake, q.dequantize(), rtol=1e-6, atol=1e-6 * float(q.scale.max()))


def test_gradients_are_those_of_lsq():
    """Closed forms of LSQ (equation 3) and LSQ+, at values inside, at the end of, and outside the range."""
    grid, scale, zero_point = Grid(3, symmetric=False), jnp.array([[0.5]]), jnp.array([[-1.25]])
    x = jnp.array([[-2.0, -1.375, 0.3, 0.8, 2.125, 3.0]])  # codes before clipping: -5.25 -4 -0.65 0.35 3 4.75
    inside = np.array([0, 1, 1, 1, 1, 0])
    total = lambda x, s, z: fake_quantize(x, grid, s, z).sum()  # noqa: E731
    dx, ds, dz = jax.grad(total, (0, 1, 2))(x, scale, zero_point)
    chex.assert_trees_all_close(dx, inside[None].astype(np.float32))
    codes = np.clip(np.round(np.asarray(x) / 0.5 - 1.25), -4, 3)
    shifted = codes + 1.25
    expected = np.where(inside, shifted - np.asarray(x) / 0.5, shifted).sum()
    chex.assert_trees_all_close(ds, np.array([[expected]], np.float32), rtol=1e-5)  # sums of six float32 terms
    chex.assert_trees_all_close(dz, np.array([[-0.5 * (1 - inside).sum()]], np.float32))


def test_dynamic_fake_quantization_passes_every_gradient():
    """Min-max covers every value, so the estimator is the identity, also for the largest one."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 16)), jnp.float32)
    gradient = jax.grad(lambda x: fake_quantize_dynamic(x, Quantizer(4, granularity="token")).sum())(x)
    # Division by the scale and multiplication by it: two float32 roundings.
    chex.assert_trees_all_close(gradient, jnp.ones_like(x), rtol=1e-6)


def test_signal_to_noise_ratio():
    x = jnp.array([3.0, 4.0])
    assert sqnr_db(x, x) == jnp.inf
    np.testing.assert_allclose(sqnr_db(x, x + 0.5), 10 * np.log10(25 / 0.5), rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 9}, {"bits": 4, "granularity": "group"},
                                   {"bits": 4, "group_size": 8}, {"bits": 4, "granularity": "row"},
                                   {"bits": 4, "range_method": "guess"},
                                   {"bits": 4, "granularity": "group", "group_size": 0}])  # fmt: skip
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError):
        Quantizer(**wrong)


def test_a_group_must_divide_the_width():
    with pytest.raises(ValueError, match="multiple"):
        quantize(jnp.ones((2, 10)), Quantizer(4, granularity="group", group_size=4))


def test_constant_and_zero_rows_keep_a_finite_scale():
    for symmetric in (True, False):
        q = quantize(jnp.zeros((2, 8)), Quantizer(4, symmetric))
        chex.assert_trees_all_equal(q.dequantize(), jnp.zeros((2, 8)))
        q = quantize(jnp.full((2, 8), 5.0), Quantizer(4, symmetric))
        chex.assert_trees_all_close(q.dequantize(), jnp.full((2, 8), 5.0), rtol=1e-6)  # one division and product
