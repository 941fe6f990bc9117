"""Bounds: operations counted by hand, at rates that are written down."""

import math

import pytest

from experiments.bench.ceilings import Work, step_work
from experiments.bench.shapes import CONFIGS, LATENT_SIZES, Shape
from experiments.planning.bounds import PEAKS, bound
from qvdjax.recipes import get

WORK = Work(linear=6e15, qk=1e15, pv=1e15)
V5E = PEAKS["TPU v5 lite"]


def test_training_is_three_passes_and_the_teachers():
    found = bound(WORK, "TPU v5 lite", 10, 0, step="train", recipe=get("qvgen-w4a4"))
    assert found["model_flops"] == 4 * 8e15
    assert found["bound_seconds"] == pytest.approx(4 * 8e15 / (10 * V5E.float_operations))
    assert bound(WORK, "TPU v5 lite", 10, 0, step="train", recipe=None)["model_flops"] == 3 * 8e15


def test_a_teacher_of_codes_multiplies_integers_and_a_known_one_nothing():
    def seconds(name="qvgen-w4a4", **teacher):
        found = bound(WORK, "TPU v5 lite", 1, 0, step="train", recipe=get(name), **teacher)
        return found["bound_seconds"], found["model_flops"]

    own = 3 * 8e15 / V5E.float_operations
    attention = 2e15 / V5E.float_operations
    integers = own + 6e15 / V5E.int8_operations + attention
    assert seconds(teacher=get("rtn-w8a8")) == (pytest.approx(integers), 4 * 8e15)
    assert (
        seconds(teacher=get("rtn-w8a16")) == seconds() == (pytest.approx(own + 8e15 / V5E.float_operations), 4 * 8e15)
    )
    assert seconds(teacher_cache=True) == seconds("lsq-w4a4") == (pytest.approx(own), 3 * 8e15)


@pytest.mark.parametrize(("recipe", "rate"), [("rtn-w8a8", "int8_operations"), ("rtn-w4a16", "float_operations")])
def test_sampling_multiplies_integers_where_both_sides_are_rounded(recipe, rate):
    found = bound(WORK, "TPU v5 lite", 1, 0, step="sample", recipe=get(recipe))
    assert found["bound_seconds"] == pytest.approx(6e15 / getattr(V5E, rate) + 2e15 / V5E.float_operations)
    assert found["bound_by"] == "matrix products"


def test_memory_bounds_a_step_of_little_work():
    found = bound(Work(linear=1e9), "TPU v5 lite", 1, 8 * 10**9, step="sample", recipe=None)
    assert found == {"model_flops": 1e9, "bound_seconds": 8e9 / V5E.bytes, "bound_by": "memory"}


def test_chips_that_are_not_known_have_no_bound():
    assert bound(WORK, "cpu", 1, None, step="sample", recipe=None)["bound_seconds"] is None


def test_work_of_a_joint_stream():
    shape = Shape("", CONFIGS["cogvideox-2b"], (*LATENT_SIZES["cogvideox"]["480p"], 16), 226)
    tokens, width = 13 * 30 * 45 + 226, 30 * 64
    assert shape.tokens + shape.text_tokens == tokens == 17776  # as the published model counts them
    assert step_work(shape).linear == pytest.approx(30 * 2 * tokens * (4 * width**2 + 2 * width * 4 * width))
    assert step_work(shape).qk == pytest.approx(30 * 2 * tokens**2 * width)


def test_tokens_follow_the_patch():
    config = {**CONFIGS["wan-tiny"], "patch_size": [3, 1, 1]}
    assert Shape("", config, (9, 8, 8, 12), 8).tokens == math.prod((3, 8, 8))
