"""The layer that is a table: which row a sample gets, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import PerCall, TableScheme, TimestepTable, check_timesteps

TIMESTEPS = (999.0, 700.125, 0.0)
ROWS = np.arange(15, dtype=np.float32).reshape(3, 5)  # steps, out


def layer(scheme=TableScheme(TIMESTEPS)):
    return TimestepTable(
        jnp.asarray(ROWS), role="modulation", axes=("mlp", "embed"), scheme=scheme, weight_shape=(5, 7)
    )


def call(timestep, x):
    table = layer()
    table.timestep = PerCall(jnp.asarray(timestep))
    return table(x)


def test_each_sample_gets_the_row_of_its_timestep():
    timestep = np.float32([700.125, 0.0, 999.0])
    np.testing.assert_array_equal(call(timestep, jnp.zeros((3, 7))), ROWS[[1, 2, 0]])
    with_tokens = call(timestep, jnp.zeros((3, 1, 7)))  # batch 1 in
    np.testing.assert_array_equal(with_tokens, ROWS[[1, 2, 0], None])


def test_tokens_may_have_timesteps_of_their_own():
    timestep = np.float32([[0.0, 999.0], [700.125, 0.0]])
    np.testing.assert_array_equal(call(timestep, jnp.zeros((2, 2, 7))), ROWS[[[2, 0], [1, 2]]])


def test_the_type_is_the_inputs():
    assert call(np.float32([999.0]), jnp.zeros((1, 7), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_timestep_that_no_row_holds_is_nan_and_rounding_is_not():
    out = call(np.float32([999.0001, 998.0]), jnp.zeros((2, 7)))  # what float32 may make of 999, and another step
    np.testing.assert_array_equal(out[0], ROWS[0])
    assert np.isnan(out[1]).all()


def test_outside_of_a_model_there_is_no_timestep():
    with pytest.raises(UserError, match="without one"):
        layer()(jnp.zeros((1, 7)))


def test_check_timesteps_names_what_is_missing():
    model = nnx.Dict({"one": layer(TableScheme(TIMESTEPS, "unipc, 3 steps"))})
    check_timesteps(model, np.array([0.0, 999.0 + 1e-4]))  # a part of them, in float64
    with pytest.raises(UserError, match="hold the 3 timesteps of unipc, 3 steps") as refusal:
        check_timesteps(jax.eval_shape(lambda: model), [999.0, 500.5, 2.0])
    assert refusal.value.items == ("500.5", "2")


@pytest.mark.parametrize("timesteps", [(), (np.nan,)])
def test_tables_without_timesteps_make_no_sense(timesteps):
    with pytest.raises(ValueError, match="finite"):
        TableScheme(timesteps)


def test_schemes_as_plain_fields():
    scheme = TableScheme(TIMESTEPS, "unipc", 12)
    assert TableScheme.from_dict(scheme.to_dict()) == scheme
