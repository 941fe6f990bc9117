import math

import jax
import jax.numpy as jnp
import pytest
from small_models import UNET

import models
from experiments.bench.ceilings import Work, attention_work, ceiling, linear_work, step_work, training_work
from experiments.bench.shapes import SHAPES, Shape, shape
from qvdjax.errors import UserError
from qvdjax.nn import Attention, layers_of


def test_operations_count_two_for_each_multiply_add():
    assert linear_work(3, 5, 7) == Work(linear=2 * 3 * 5 * 7)
    assert attention_work(11, 13, 6) == Work(qk=2 * 11 * 13 * 6, pv=2 * 11 * 13 * 6)


# Published operation counts of one forward pass at 81 frames of 832 x 480, 10^12 operations, as linear and
# attention: counted independently of this code from the configurations (cross-attention included).
@pytest.mark.parametrize(
    ("name", "linear", "attention"), [("wan2.1-1.3b-480p", 82, 201), ("wan2.1-14b-480p", 785, 893)]
)
def test_the_work_of_a_wan_step(name, linear, attention):
    work = step_work(shape(name))
    assert work.linear / 1e12 == pytest.approx(linear, abs=0.5)  # given as whole numbers
    assert (work.qk + work.pv) / 1e12 == pytest.approx(attention, abs=0.5)


def products_of(jaxpr, kinds=("dot_general", "conv_general_dilated")) -> float:
    """Two for each multiply-add of the products and convolutions of a program."""
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [p for value in equation.params.values() for p in (value if isinstance(value, tuple) else (value,))]
        inner = [getattr(p, "jaxpr", p) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns")]
        total += sum(products_of(p, kinds) for p in inner)
        if equation.primitive.name not in kinds:
            continue
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        if equation.primitive.name == "conv_general_dilated":
            weight, outputs = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(weight) // weight[outputs]
    return total


@pytest.mark.parametrize("fields", [{}, {"layers_per_block": 2, "use_motion_mid_block": False}])
def test_the_work_of_a_unet_step_is_that_of_its_program(fields):
    config, latents = {**UNET, **fields, "motion_max_seq_length": 16}, (16, 32, 48, 5)
    model = models.abstract(config)
    for _, _, layer in layers_of(model, (Attention,)):
        layer.implementation = "xla"  # whose two products are in the program as they are

    def blocks(model, latents):
        stream, conditioning = model.embed(latents, jnp.zeros(1), jnp.zeros((1, 77, 24)))
        for stack in model.stacks:
            stream, _ = stack(stream, conditioning)
        return stream.sample

    program = jax.make_jaxpr(blocks)(model, jnp.zeros((1, *latents)))
    work = step_work(Shape("", config, latents, 77))
    # Left out are the first convolution and the layers of the timestep: 1 % at these narrow widths.
    assert work.total == pytest.approx(products_of(program.jaxpr), rel=0.02)
    assert work.qk == work.pv
    # 1 x 1 convolutions (shortcuts of ResNets, projections) are products in a program of floats.
    wide = products_of(program.jaxpr, ("conv_general_dilated",))
    # They are 6 to 7 % beside the 3 x 3 ones.
    assert 1.05 < work.convolution / wide < 1.08


def test_training_is_three_passes_and_the_teachers():
    forward = Work(linear=5, qk=2, pv=1)
    assert training_work(forward, teacher=False) == Work(linear=15, qk=6, pv=3)
    assert training_work(forward, teacher=True).total == 4 * forward.total


def test_a_ceiling_is_amdahls_law():
    work = Work(linear=50, qk=25, pv=25)
    assert ceiling(work) == 1
    assert ceiling(work, linear_factor=2) == pytest.approx(1 / 0.75)
    assert ceiling(work, linear_factor=2, qk_factor=2) == pytest.approx(1 / 0.625)
    assert ceiling(work, linear_factor=1e12) == pytest.approx(2)
    assert ceiling(Work(linear=1, convolution=3), convolution_factor=3) == pytest.approx(2)
    assert ceiling(work, linear_factor=0.5) < 1  # a device whose integers are slower


def test_tokens_are_whole_patches_of_the_latents():
    assert shape("wan2.1-14b-480p").tokens == 21 * 30 * 52
    assert all(s.latents[1] % 2 == s.latents[2] % 2 == 0 for s in SHAPES.values())


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="wan2.1-14b-480p"):
        shape("wan")
