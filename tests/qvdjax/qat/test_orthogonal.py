"""Orthogonal factors against dense decompositions in NumPy, and what follows a change of basis."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.qat.orthogonal import BasisChange, reorthogonalize, singular_values, small_share, thin_qr

# Compiled once for each shape.
reorthogonalized = jax.jit(reorthogonalize, static_argnames="blocks")


def factors(kind, out=13, rank=6, inputs=9, seed=0):
    """L [out, rank] and R [rank, in] in float64, some of them nasty."""
    random = np.random.default_rng(seed)
    left, right = random.standard_normal((out, rank)), random.standard_normal((rank, inputs))
    if kind == "zero":
        left, right = left * 0, right * 0
    elif kind == "zero left":
        left = left * 0
    elif kind == "lower rank":
        left = left[:, :2] @ random.standard_normal((2, rank))
    elif kind == "equal columns":
        left, right = left[:, :1] + 0 * left, right[:1] + 0 * right
    elif kind == "unequal scales":
        left, right = left * 1e4, right * 1e-5
    elif kind == "graded":
        left = left * 10.0 ** -np.arange(rank)
    elif kind == "nearly dependent":
        left = left[:, :1] + 1e-5 * left
    elif kind == "unequal partners":  # a direction of L R that is 1e5 times stronger in R than in L
        left, right = (
            left / 10.0 ** np.array([5, 0, 0, 0, 0, 0]),
            right * 10.0 ** np.array([[5], [0], [0], [0], [0], [0]]),
        )
        turn = np.linalg.qr(random.standard_normal((rank, rank)))[0]
        left, right = left @ turn, turn.T @ right
    elif kind == "equal values":
        left, right = np.linalg.qr(left)[0], np.linalg.qr(right.T)[0].T
    return left, right


KINDS = ["random", "zero", "zero left", "lower rank", "equal columns", "unequal scales", "graded", "nearly dependent",
         "unequal partners", "equal values"]  # fmt: skip


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("active", [6, 4, 1, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_dense_decomposition(kind, active, double):
    left, right = factors(kind)
    kept = left[:, :active] @ right[:active]
    scale = np.linalg.norm(left[:, :active]) * np.linalg.norm(right[:active])
    # A backward stable decomposition errs by a small multiple of the rounding unit times the norms of what it
    # was given; 20 covers the sums over 6 and 13 entries.
    rounding = 20 * (np.finfo(np.float64).eps if double else np.finfo(np.float32).eps)
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        new_left, new_right, change = reorthogonalized(jnp.asarray(left, dtype), jnp.asarray(right, dtype), active)
        assert new_left.dtype == new_right.dtype == change.matrix.dtype == dtype
        arrays = (new_left, new_right, change.matrix, change.inverse)
        new_left, new_right, matrix, inverse = (np.asarray(a, np.float64) for a in arrays)
    assert all(np.isfinite(a).all() for a in (new_left, new_right, matrix, inverse))
    assert not new_left[:, active:].any()
    assert not new_right[active:].any()
    np.testing.assert_allclose(new_left @ new_right, kept, rtol=0, atol=rounding * scale)
    values = np.pad(np.linalg.svd(kept, compute_uv=False), (0, 6))[:6]
    # Gram matrices are the values, off the diagonal nothing.
    np.testing.assert_allclose(new_left.T @ new_left, np.diag(values), rtol=0, atol=rounding * scale)
    np.testing.assert_allclose(new_right @ new_right.T, np.diag(values), rtol=0, atol=rounding * scale)


@pytest.mark.parametrize("kind", ["random", "lower rank", "graded"])
def test_the_change_of_basis_leads_from_old_to_new(kind):
    left, right = factors(kind)
    with jax.enable_x64(True):
        new_left, new_right, change = reorthogonalized(jnp.asarray(left), jnp.asarray(right), 4)
        moved_left, moved_right = change.factors(jnp.asarray(left), jnp.asarray(right))
    # Rounding of double precision; the graded factors' smallest direction is 1e-3 of the largest, so 1e-10 is loose.
    # A direction that is there only by rounding belongs to neither: sqrt(1e-16) = 1e-8 in the factors.
    loose = 1e-7 if kind == "lower rank" else 1e-10
    np.testing.assert_allclose(moved_left, new_left, atol=loose)
    np.testing.assert_allclose(moved_right, new_right, atol=loose)
    rank = 2 if kind == "lower rank" else 4
    identity = np.diag([1.0] * rank + [0.0] * (6 - rank))
    np.testing.assert_allclose(np.asarray(change.inverse) @ np.asarray(change.matrix), identity, atol=1e-10)


def test_leading_axes_and_layers_narrower_than_the_rank():
    random = np.random.default_rng(1)
    left = random.standard_normal((2, 3, 4, 7)).astype(np.float32)
    right = random.standard_normal((2, 3, 7, 5)).astype(np.float32)
    new_left, new_right, change = reorthogonalized(left, right, 6)
    assert new_left.shape == left.shape
    assert new_right.shape == right.shape
    assert change.matrix.shape == change.inverse.shape == (2, 3, 7, 7)
    # Products of numbers near 1, summed over 6: float32 to a few units.
    np.testing.assert_allclose(new_left @ new_right, left[..., :6] @ right[..., :6, :], atol=2e-5)
    assert not new_left[..., 4:].any()  # [4, 5] matrices have four directions
    assert not new_right[..., 4:, :].any()


def test_types_are_kept_and_computed_in_float32():
    left, right = (jnp.asarray(a, jnp.bfloat16) for a in factors("random"))
    new_left, new_right, change = reorthogonalized(left, right)
    assert new_left.dtype == new_right.dtype == jnp.bfloat16
    assert change.matrix.dtype == jnp.float32


def test_factors_in_form_do_not_move():
    left, right, _ = reorthogonalized(*(jnp.asarray(a, jnp.float32) for a in factors("random")))
    again_left, again_right, change = reorthogonalized(left, right)
    # The values of these factors lie apart by a tenth and more, so vectors are good to ten units of rounding.
    np.testing.assert_allclose(change.matrix, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(again_left, left, atol=1e-5)
    np.testing.assert_allclose(again_right, right, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 5), (3, 8, 5), (4, 6)])
def test_qr_in_blocks(blocks, shape):
    tall = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    q, r = jax.jit(thin_qr, static_argnums=1)(tall, blocks)
    assert q.shape == (*shape[:-1], min(shape[-2:]))
    np.testing.assert_allclose(q @ r, tall, atol=1e-5)  # float32, sums of up to 6 products near 1
    np.testing.assert_allclose(
        np.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(q.shape[-1]), r.shape[:-1] + q.shape[-1:]), atol=1e-5
    )


def test_qr_in_blocks_gives_the_same_factors():
    left, right = (jnp.asarray(a, jnp.float32) for a in factors("random", out=16, inputs=12))
    whole, cut = reorthogonalized(left, right, 4), reorthogonalized(left, right, 4, blocks=(8, 4))
    # The values lie apart, and signs are fixed by the change of basis: the same vectors to rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, cut)


# What follows a change of basis


def random_change(seed, rank=4, orthogonal=False):
    matrix = np.random.default_rng(seed).standard_normal((rank, rank)) + 2 * np.eye(rank)
    if orthogonal:
        matrix = np.linalg.qr(matrix)[0]
    return BasisChange(jnp.asarray(matrix), jnp.asarray(np.linalg.inv(matrix)))


def loss(left, right, gamma, target):
    """Not quadratic in L R, so that gradients change on the way."""
    w = (left * gamma) @ right
    return jnp.sum(jnp.log(jnp.cosh(w - target))) + 0.1 * jnp.sum((w - target) ** 2)


GRADIENT = jax.grad(loss, argnums=(0, 1))


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=10)
def test_gradients_in_the_new_basis_are_the_transported_ones(seed):
    with jax.enable_x64(True):
        left, right = (jnp.asarray(a) for a in factors("random", rank=4, seed=seed))
        target = jnp.asarray(np.random.default_rng(seed + 1).standard_normal((13, 9)))
        change, ones = random_change(seed), jnp.ones(4)
        old = GRADIENT(left, right, ones, target)
        new = GRADIENT(*change.factors(left, right), ones, target)
        moved = change.gradients(*old)
        # Double precision, a basis whose condition stays below 1e3 or so.
        for a, b in zip(moved, new):
            np.testing.assert_allclose(a, b, atol=1e-9 * float(jnp.abs(b).max()))
        # A step and a gradient keep their product.
        step = [jnp.asarray(np.random.default_rng(seed + 2).standard_normal(a.shape)) for a in (left, right)]
        product = sum(jnp.vdot(a, b) for a, b in zip(old, step))
        moved_product = sum(jnp.vdot(a, b) for a, b in zip(moved, change.factors(*step)))
        np.testing.assert_allclose(moved_product, product, rtol=1e-8, atol=1e-8)


def test_momentum_is_what_the_new_basis_would_have_gathered():
    with jax.enable_x64(True):
        random = np.random.default_rng(3)
        change, ones = random_change(4), jnp.ones(4)
        old, new = [0.0, 0.0], [0.0, 0.0]
        for _ in range(5):  # any path of the factors
            left, right = jnp.asarray(random.standard_normal((5, 4))), jnp.asarray(random.standard_normal((4, 3)))
            target = jnp.asarray(random.standard_normal((5, 3)))
            old = [0.9 * m + g for m, g in zip(old, GRADIENT(left, right, ones, target))]
            new = [0.9 * m + g for m, g in zip(new, GRADIENT(*change.factors(left, right), ones, target))]
        for a, b in zip(change.gradients(*old), new):
            np.testing.assert_allclose(a, b, atol=1e-10)  # double precision


def run(left, right, momentum, target, rate, steps, gamma):
    """SGD with momentum; returns the factors, the momentum and the path of L R."""

    def step(carry, _):
        left, right, momentum = carry
        gradients = GRADIENT(left, right, gamma, target)
        momentum = tuple(0.9 * m + g for m, g in zip(momentum, gradients))
        left, right = left - rate * momentum[0], right - rate * momentum[1]
        return (left, right, momentum), (left * gamma) @ right

    carry, path = jax.lax.scan(step, (left, right, momentum), length=steps)
    return *carry, path


@pytest.mark.parametrize("kind", ["random", "equal values"])
def test_a_balanced_boundary_does_not_move_the_path(kind):
    """Exact: from L^T L = R R^T, SGD with transported momentum walks the same path of L R, step for step."""
    with jax.enable_x64(True):
        left, right, _ = reorthogonalize(*(jnp.asarray(a) for a in factors(kind)))
        turn = jnp.asarray(np.linalg.qr(np.random.default_rng(5).standard_normal((6, 6)))[0])
        left, right = left @ turn, turn.T @ right  # balanced, but not in the form of an SVD
        target, ones = jnp.asarray(np.random.default_rng(6).standard_normal((13, 9))), jnp.ones(6)
        momentum = GRADIENT(left, right, ones, target * 0.5)
        new_left, new_right, change = reorthogonalize(left, right)
        assert float(jnp.abs(change.matrix - jnp.eye(6)).max()) > 0.1  # there is something to follow
        np.testing.assert_allclose(change.matrix @ change.matrix.T, np.eye(6), atol=1e-10)
        with_change = run(new_left, new_right, change.gradients(*momentum), target, 0.01, 30, ones)[-1]
        without = run(left, right, momentum, target, 0.01, 30, ones)[-1]
        # Rounding of double precision over 30 steps that move L R by about 1.
        np.testing.assert_allclose(with_change, without, atol=1e-10)
        assert float(jnp.abs(without[-1] - without[0]).max()) > 0.1


def test_a_phase_of_training_and_its_boundary_hold_to_first_order():
    """A phase from its balanced start with half of the directions fading, the cut, and the steps after it."""

    def distance(rate):
        left, right, _ = reorthogonalize(*(jnp.asarray(a) for a in factors("random")))
        target = jnp.asarray(np.random.default_rng(7).standard_normal((13, 9)))
        kept = jnp.asarray([1.0, 1, 1, 0, 0, 0])
        zero = (jnp.zeros_like(left), jnp.zeros_like(right))
        left, right, momentum, first = run(left, right, zero, target, rate, 6, kept + 0.5 * (1 - kept))
        new_left, new_right, change = reorthogonalize(left, right, 3)
        after = run(new_left, new_right, change.gradients(*momentum), target, rate, 6, kept)[-1]
        without = run(left, right, momentum, target, rate, 6, kept)[-1]
        return float(jnp.linalg.norm(after[-1] - without[-1])), float(jnp.linalg.norm(without[-1] - without[0]))

    with jax.enable_x64(True):
        (coarse, moved), (fine, _) = distance(2e-3), distance(1e-3)
    # Third order: an eighth at half the rate. Terms of fourth order change the ratio by about rate * curvature.
    assert 6.5 < coarse / fine < 9.5
    assert coarse < 1e-2 * moved


@pytest.mark.parametrize("seed", range(3))
def test_signs_and_equal_values_do_not_matter(seed):
    """Whichever vectors the decomposition chooses: A A^T, all that a path of L R sees of it, is the same."""
    with jax.enable_x64(True):
        random = np.random.default_rng(seed)
        left, right = (jnp.asarray(a) for a in factors("equal values", seed=seed))
        stretch = jnp.asarray(random.standard_normal((6, 6)) + 3 * np.eye(6))
        left, right = left @ stretch, jnp.linalg.inv(stretch) @ right  # six equal singular values, any basis
        _, _, change = reorthogonalize(left, right)
        other = jnp.asarray(np.linalg.qr(random.standard_normal((6, 6)))[0])  # another choice of their vectors
        turned = BasisChange(change.matrix @ other, other.T @ change.inverse)
        momentum = tuple(jnp.asarray(random.standard_normal(a.shape)) for a in (left, right))

        def step(change):
            points, steps = change.factors(left, right), change.gradients(*momentum)
            return (points[0] - 0.1 * steps[0]) @ (points[1] - 0.1 * steps[1])

        np.testing.assert_allclose(step(turned), step(change), atol=1e-9)  # double precision
        mean = np.asarray(change.matrix @ change.matrix.T)
        # The geometric mean X of (L^T L)^-1 and R R^T is the positive solution of X (L^T L) X = R R^T.
        np.testing.assert_allclose(mean @ (left.T @ left) @ mean, right @ right.T, atol=1e-9)


def test_second_moments_follow_by_squares():
    random = np.random.default_rng(8)
    squares = tuple(jnp.asarray(random.random(shape), jnp.float32) for shape in ((5, 4), (4, 3)))
    flip = np.diag([1.0, -1, 1, -1])[:, [2, 0, 3, 1]]  # signs and an exchange
    left, right = BasisChange(jnp.asarray(flip), jnp.asarray(flip.T)).squares(*squares)
    np.testing.assert_array_equal(left, np.asarray(squares[0])[:, [2, 0, 3, 1]])
    np.testing.assert_array_equal(right, np.asarray(squares[1])[[2, 0, 3, 1]])
    with jax.enable_x64(True):
        squares = tuple(jnp.asarray(a, jnp.float64) for a in squares)
        left, right = random_change(9, orthogonal=True).squares(*squares)
        np.testing.assert_allclose(left.sum(1), squares[0].sum(1), rtol=1e-12)
        np.testing.assert_allclose(right.sum(0), squares[1].sum(0), rtol=1e-12)
        assert (left > 0).all()
        assert (right > 0).all()


def test_squares_are_exact_for_uncorrelated_gradients():
    random = np.random.default_rng(10)
    with jax.enable_x64(True):
        change = random_change(11)
        gradients = jnp.asarray(random.standard_normal((40_000, 4)) * [1.0, 2, 3, 4])  # a row of L, many times
        moved, _ = change.gradients(gradients, jnp.zeros((4, 1)))
        squares, _ = change.squares(jnp.mean(gradients**2, 0, keepdims=True), jnp.zeros((4, 1)))
        # The mean of 40,000 squares of a Gaussian is known to sqrt(2 / 40,000) = 0.7 %; five of that.
        np.testing.assert_allclose(jnp.mean(moved**2, 0), squares[0], rtol=0.035)


def test_nothing_moves_in_the_same_basis():
    random = np.random.default_rng(12)
    left, right = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((5, 4), (4, 3)))
    same = BasisChange(jnp.eye(4), jnp.eye(4))
    for moved in (same.factors(left, right), same.gradients(left, right), same.squares(left, right)):
        np.testing.assert_array_equal(moved[0], left)
        np.testing.assert_array_equal(moved[1], right)


# What is watched


@pytest.mark.parametrize("kind", KINDS)
def test_singular_values(kind):
    left, right = factors(kind)
    values = singular_values(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))
    dense = np.linalg.svd(left @ right, compute_uv=False)[:6]
    # Backward stable, as above.
    np.testing.assert_allclose(values, dense, atol=3e-6 * np.linalg.norm(left) * np.linalg.norm(right))


def test_share_of_small_values():
    values = jnp.asarray([[14.0, 7, 1.01, 0.99], [1, 1, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(small_share(values), [0.25, 0, 1])
    np.testing.assert_array_equal(small_share(values, threshold=13.0), [0.5, 0, 1])
