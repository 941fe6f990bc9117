"""Bits by sensitivity: costs are errors of outputs, the average is kept, what is spent is spent where it helps."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import wan, wan_inputs

import models
import qvdjax
from qvdjax.calibration.ranges import input_ranges
from qvdjax.errors import UserError
from qvdjax.ptq import apply_schemes
from qvdjax.ptq.mixed_precision import MixedPrecision, allocate, sensitivities
from qvdjax.recipes import decide, get


@pytest.mark.parametrize("recipe", ["rtn-w4a16", "vidit-q-w4a16", "svdquant-w4a16"])
def test_costs_are_what_one_rounded_layer_does_to_the_prediction(recipe):
    model, batches = wan(), [wan_inputs(seed=1), wan_inputs(seed=2)]
    chosen, name = get(recipe), "blocks.1.ffn.net.2"
    ranges = input_ranges(model, batches) if chosen.needs_ranges else None
    decided = decide(model, chosen).schemes
    plan = MixedPrecision(4.0, (3, 4, 6), inputs=4)
    costs = sensitivities(model, decided, batches, plan, fit=chosen.transform, ranges=ranges)
    run = jax.jit(lambda model, inputs: model(**inputs))
    alone = apply_schemes(model, {name: decided[name]}, execution="simulate", fit=chosen.transform, ranges=ranges)
    exact = jnp.stack([run(model, inputs) for inputs in batches])
    found = jnp.stack([run(alone, inputs) for inputs in batches])
    # One layer's rounding through float32 sums of another order; a rotation's come back through its inverse.
    wanted = float(jnp.square(found - exact).sum() / jnp.square(exact).sum())
    assert costs[name][1] == pytest.approx(wanted, rel=2e-2)
    assert all(three > four > six for three, four, six in costs.values())


@hypothesis.given(
    costs=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    average=st.floats(2, 8), sizes=st.lists(st.integers(1, 50), min_size=6, max_size=6),
)  # fmt: skip
@hypothesis.settings(max_examples=60)
def test_the_average_is_kept_and_no_saving_step_is_left(costs, average, sizes):
    plan = MixedPrecision(average, (2, 4, 8))
    # Errors fall with bits.
    costs = {f"layer {i}": np.sort(np.array(one))[::-1] for i, one in enumerate(costs)}
    sizes = dict(zip(costs, sizes, strict=False))
    bits = allocate(costs, sizes, plan)
    spent = sum(bits[name] * sizes[name] for name in costs)
    assert spent <= average * sum(sizes.values()) + 1e-6
    for name in costs:
        number = plan.choices.index(bits[name])
        if number < 2 and costs[name][number + 1] < costs[name][number]:
            step = (plan.choices[number + 1] - plan.choices[number]) * sizes[name]
            assert spent + step > average * sum(sizes.values()) - 1e-6  # it would not fit


def test_bits_go_where_they_save_most():
    plan = MixedPrecision(4.0, (2, 4, 8))
    costs = {"hard": np.array([0.9, 0.5, 0.0]), "easy": np.array([0.1, 0.01, 0.0]), "flat": np.array([0.2, 0.2, 0.2])}
    # 12 bits for three layers of one size: the hard one takes eight, which leaves two each for the others.
    assert allocate(costs, dict.fromkeys(costs, 1), plan) == {"hard": 8, "easy": 2, "flat": 2}


def test_a_model_of_mixed_bits_is_nearer_and_no_larger(tmp_path):
    model, batches = wan(), [wan_inputs(seed=1)]
    run = jax.jit(lambda model, inputs: model(**inputs))
    exact = run(model, wan_inputs())
    error = lambda one: float(jnp.square(run(one, wan_inputs()) - exact).sum())  # noqa: E731
    plain = qvdjax.quantize(model, "rtn-w3a16")
    mixed = qvdjax.quantize(model, get("rtn-w3a16", average_bits=3), batches)
    assert error(mixed) < error(plain)
    rows = [row for row in qvdjax.describe(mixed) if row["execution"] != "float"]
    weights = np.array([np.prod(row["shape"]) for row in rows])
    assert len({row["weight_bits"] for row in rows}) > 1
    assert np.average([row["weight_bits"] for row in rows], weights=weights) <= 3
    assert all("bits by what they cost" in row["reason"] for row in rows)
    models.save(mixed, tmp_path / "model")
    assert [row["weight_bits"] for row in qvdjax.describe(models.load(tmp_path / "model"))] == [
        row["weight_bits"] for row in qvdjax.describe(mixed)
    ]  # fmt: skip


def test_averages_out_of_reach_and_trained_methods_are_refused():
    with pytest.raises(ValueError, match="9 bits does not lie in 2 to 8"):
        MixedPrecision(9)
    with pytest.raises(ValueError, match="ascending"):
        MixedPrecision(4, (4, 2))
    with pytest.raises(UserError, match="bits of a trained method are one number"):
        get("lsq-w4a4", average_bits=4)
    with pytest.raises(UserError, match="needs a calibration set"):
        qvdjax.quantize(wan(), get("rtn-w4a4", average_bits=4))
