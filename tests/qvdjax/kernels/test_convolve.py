"""The convolution and its own gradients on CPU, against jax's."""

import chex
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvdjax.kernels.convolve import convolve


def reference(x, weight, stride, padding):
    """jax's convolution, in the layout of the weights as they are."""
    space = "DHW"[3 - len(stride) :]
    layout = (f"N{space}C", f"OI{space}", f"N{space}C")
    return jax.lax.conv_general_dilated(x, weight, stride, padding, dimension_numbers=layout)


def both(x, weight, stride, padding):
    """Values and gradients of both, towards the same random direction."""
    shape = jax.eval_shape(lambda x, w: reference(x, w, stride, padding), x, weight).shape
    direction = jax.random.normal(jax.random.key(2), shape)
    for function in (convolve, reference):
        value, pull = jax.vjp(lambda x, w, f=function: f(x, w, stride, padding), x, weight)
        yield value, pull(direction)


@st.composite
def cases(draw):
    """Space, kernel, stride and padding of one to three axes; borders may be wider than the kernel."""
    axes = draw(st.integers(1, 3))
    several = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    kernel, stride = several(1, 3), several(1, 3)
    padding = tuple(zip(several(0, 3), several(0, 2), strict=True))
    space = tuple(k + extra for k, extra in zip(kernel, several(0, 4), strict=True))
    return space, kernel, stride, padding


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_values_and_gradients_are_those_of_jax(case):
    space, kernel, stride, padding = case
    x = jax.random.normal(jax.random.key(0), (2, *space, 3))
    weight = jax.random.normal(jax.random.key(1), (5, 3, *kernel))
    ours, theirs = both(x, weight, stride, padding)
    # float32 sums of at most 2 * 7^3 products of normal numbers, in another order.
    chex.assert_trees_all_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_have_the_types_of_their_arguments(dtype):
    x, weight = jnp.ones((1, 4, 4, 2), jnp.float32), jnp.ones((3, 2, 3, 3), dtype)
    function = lambda x, w: convolve(x.astype(dtype), w, (1, 1), ((1, 1), (1, 1))).astype(jnp.float32).sum()  # noqa: E731
    gradients = jax.grad(function, (0, 1))(x, weight)
    assert [g.dtype for g in gradients] == [jnp.float32, dtype]


def test_integers_are_summed_exactly():
    codes = jnp.full((1, 9, 9, 40), 127, jnp.int8)
    total = convolve(codes, jnp.full((2, 40, 3, 3), -128, jnp.int8), (1, 1), ((0, 0), (0, 0)), into=jnp.int32)
    assert total.dtype == jnp.int32
    assert bool((total == -127 * 128 * 360).all())


def test_inside_a_loop_no_layout_of_weights_is_left_but_the_fast_one():
    """What makes the loop slow is a convolution whose weights have another order than [*kernel, in, out]."""
    x, weight = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 3))

    def steps(weight):
        loss = lambda w: jnp.square(convolve(x, w, (1, 1), ((1, 1), (1, 1)))).sum()  # noqa: E731
        return jax.lax.fori_loop(0, 3, lambda _, w: w - 1e-3 * jax.grad(loss)(w), weight)

    text = jax.jit(steps).lower(weight).as_text()
    layouts = {line.partition("dim_numbers = ")[2].partition(",  window")[0].split(", window")[0]
               for line in text.splitlines() if "stablehlo.convolution" in line}  # fmt: skip
    assert layouts == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
