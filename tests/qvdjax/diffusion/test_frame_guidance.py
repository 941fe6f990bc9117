"""Guidance that rises over the frames, and conditions that another takes the place of in the negative pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.calibration.dataset import Trajectory
from qvdjax.diffusion import DDIM, EulerEDM, guidance_scales, guided, guided_steps, sample
from qvdjax.errors import UserError

SHAPE = (2, 3, 2, 2, 1)  # batch, frames, height, width, channels


def model(latents, timestep, context, image=None):
    """Sees the context's mean, and the image where it is given one."""
    seen = context.mean(axis=(1, 2))[:, None, None, None, None]
    return jnp.full_like(latents, 1.0) * seen + (0 if image is None else image)


def inputs(**conditions):
    return {
        "latents": jnp.zeros(SHAPE), "timestep": jnp.zeros(2), "context": jnp.ones((2, 1, 4)),
        "negative_context": jnp.zeros((2, 1, 4)), **conditions,
    }  # fmt: skip


@pytest.mark.parametrize("doubled_batch", [False, True])
def test_each_frame_has_its_scale(doubled_batch):
    found = guided(model, jnp.array([1.0, 2.0, 3.0]), doubled_batch=doubled_batch)(**inputs())
    np.testing.assert_array_equal(found[:, :, 0, 0, 0], [[1, 2, 3]] * 2)


@pytest.mark.parametrize("doubled_batch", [False, True])
def test_a_negative_condition_stands_in_in_the_negative_pass(doubled_batch):
    given = inputs(image=jnp.full(SHAPE, 10.0), negative_image=jnp.full(SHAPE, 4.0))
    found = guided(model, 2.0, doubled_batch=doubled_batch)(**given)
    np.testing.assert_array_equal(found, np.full(SHAPE, 4 + 2 * (11 - 4.0)))
    np.testing.assert_array_equal(guided(model, 1)(**given), np.full(SHAPE, 11.0))


def test_calibration_sees_what_each_pass_sees():
    one = np.ones(SHAPE[1:], np.float32)
    trajectory = Trajectory(one[None], np.zeros(1), one[0, 0], 0 * one[0, 0], {"image": one, "negative_image": 5 * one})
    own, other = trajectory.inputs([0])
    assert own.keys() == other.keys() == {"latents", "timestep", "context", "image"}
    assert (own["image"].mean(), other["image"].mean()) == (1, 5)


def test_scales_rise_evenly_over_the_frames():
    scales = guidance_scales(3.0, np.array([900.0, 100.0]), first_frame=1.0, frames=5)
    np.testing.assert_allclose(scales, [[1, 1.5, 2, 2.5, 3]] * 2)  # torch.linspace(1, 3, 5) in diffusers' pipeline
    np.testing.assert_allclose(guidance_scales(3.0, np.zeros(2), first_frame=1.0), [[1], [1]])


@pytest.mark.parametrize("loop", [False, True])
def test_sampling_with_a_scale_a_frame(loop):
    noise = jnp.zeros(SHAPE)
    given = {"context": jnp.ones((2, 1, 4)), "negative_context": jnp.zeros((2, 1, 4)), "noise": noise, "steps": 1}
    found = sample(
        jax.tree_util.Partial(model), solver=DDIM(prediction_type="sample"), guidance_scale=5.0,
        first_frame_guidance=1.0, on_step=(lambda *_: None) if loop else None, **given,
    )  # fmt: skip
    np.testing.assert_allclose(found.latents[:, :, 0, 0, 0], [[1, 3, 5]] * 2)  # one step leads to the prediction


def test_all_steps_are_guided_where_timesteps_are_negative():
    timesteps = EulerEDM().schedule(5).timesteps
    assert timesteps[-1] < 0
    assert guided_steps(3.0, timesteps) == 5
    assert guided_steps(3.0, timesteps, 0.5) == np.count_nonzero(timesteps >= 0.5)


@pytest.mark.parametrize(("options", "message"), [
    ({"guidance_scale": 1.0, "first_frame": 2.0}, "a guidance scale of 1 is none.* first frame's cannot be 2"),
    ({"guidance_scale": 3.0, "first_frame": float("nan")}, "scale is nan"),
    ({"guidance_scale": 3.0, "first_frame": 1.0, "dynamic": "step"}, "over the frames and over the steps"),
])  # fmt: skip
def test_scales_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        guidance_scales(timesteps=np.zeros(2), frames=3, **options)
