"""Solvers from diffusers' scheduler_config.json, as diffusers itself writes it, and what stands in for it."""

import json

import pytest

from models.pipeline import side_files
from models.scheduler import KNOWN, PUBLISHED, SCHEDULER, read_scheduler, sampling_defaults, scheduler_file
from qvdjax.diffusion import DDIM, DPMSolverSDE, EulerEDM, FlowMatchEuler, UniPCFlow
from qvdjax.errors import UserError

COGVIDEOX_2B = {
    "_class_name": "CogVideoXDDIMScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}
ANIMATEDIFF = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "steps_offset": 1,
}
# As the program that the model was published with samples it, in diffusers' words.
MODELSCOPE = {**ANIMATEDIFF, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
SVD = {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 3.0,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


@pytest.fixture
def repository(tmp_path):
    """A diffusers repository: `transformer` and a `scheduler` beside it, whose content is to be written."""
    for name in ("transformer", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    return tmp_path


def write(repository, config):
    path = repository / "scheduler" / SCHEDULER
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "solver"),
    [
        (COGVIDEOX_2B, DDIM()),
        (
            {**COGVIDEOX_2B, "_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1},
            DPMSolverSDE(snr_shift_scale=1),
        ),
        (ANIMATEDIFF, PUBLISHED["animatediff"].solver),
        (MODELSCOPE, PUBLISHED["modelscope"].solver),
        (SVD, EulerEDM()),
        ({**SVD, "sigma_max": 80.0}, EulerEDM(sigma_max=80.0)),
        (WAN, UniPCFlow(3.0)),
        ({**WAN, "solver_order": 3}, UniPCFlow(3.0, order=3)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}, FlowMatchEuler(7.0)),
    ],
)
def test_solvers_of_published_schedulers(repository, config, solver):
    path = write(repository, config)
    assert read_scheduler(path) == solver
    defaults = sampling_defaults(repository / "transformer")
    assert (defaults.solver, defaults.steps, defaults.guidance_scale) == (solver, 50, 5.0)


@pytest.mark.parametrize("name", KNOWN)
def test_fields_and_defaults_are_those_of_diffusers(repository, name):
    """What is left out of a file means what it means to diffusers; what diffusers writes can be read."""
    scheduler = getattr(pytest.importorskip("diffusers"), name)
    needed = {
        "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        "DDIMScheduler": {"clip_sample": False},
        "EulerDiscreteScheduler": {name: value for name, value in SVD.items() if name != "_class_name"},
    }.get(name, {})
    path = write(repository, {"_class_name": name, **needed})
    sparse = read_scheduler(path)
    scheduler(**needed).save_pretrained(repository / "scheduler")
    assert {"_class_name", "num_train_timesteps"} <= json.loads(path.read_text()).keys()
    assert read_scheduler(path) == sparse


def test_the_nearest_scheduler_counts(repository):
    transformer = repository / "transformer"
    assert scheduler_file(transformer) is None
    assert side_files(transformer) == {}
    beside = write(repository, WAN)
    assert scheduler_file(transformer) == beside
    assert side_files(transformer) == {SCHEDULER: beside}  # so that a quantized folder keeps it
    own = transformer / SCHEDULER
    own.write_text(json.dumps({**WAN, "flow_shift": 9.0}))
    assert sampling_defaults(transformer).solver == UniPCFlow(9.0)
    (repository / "linked").symlink_to(transformer)
    own.unlink()
    assert scheduler_file(repository / "linked") == beside


def test_without_a_scheduler_the_familys_settings_hold(repository):
    assert sampling_defaults(repository / "transformer") == PUBLISHED["wan"]


def test_version_1_5_of_cogvideox_has_another_size_and_rate(tmp_path):
    config = {"_class_name": "CogVideoXTransformer3DModel", "use_rotary_positional_embeddings": True}
    found = []
    for patch in ({}, {"patch_size_t": 2}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **patch}))
        found.append(sampling_defaults(tmp_path))
    sizes = [(one.latents, one.padding, one.fps) for one in found]
    assert sizes == [((13, 60, 90), 0, 8), ((22, 96, 170), 1, 16)]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "LCMScheduler"}, "'LCMScheduler'.*--solver.*UniPCMultistepScheduler.*CogVideoXDPMScheduler"),
        ({}, "asks for None"),
        ({"_class_name": ["DDIM"]}, r"asks for \['DDIM'\]"),
        ({**WAN, "use_flow_sigmas": False}, "use_flow_sigmas False"),
        ({"_class_name": "UniPCMultistepScheduler"}, "2: use_flow_sigmas False, prediction_type 'epsilon'"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler does not have here .*clip_sample True"),
        ({**ANIMATEDIFF, "thresholding": True}, "thresholding True"),
        ({**WAN, "flow_shift": "3"}, "'flow_shift' is '3'"),
        ({**WAN, "solver_order": 2.0}, "order is 2.0"),
        ({**COGVIDEOX_2B, "num_train_timesteps": 500}, "num_train_timesteps 500"),
        ({**COGVIDEOX_2B, "beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ({**COGVIDEOX_2B, "beta_start": float("nan")}, "'beta_start' is nan"),
        (
            {"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.002},
            "use_karras_sigmas False, timestep_type 'disc",
        ),
        ({**SVD, "sigma_max": None}, "sigma_max is None"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting True"),
    ],
)
def test_schedulers_that_are_not_here(repository, config, named):
    write(repository, config)
    with pytest.raises(UserError, match=named):
        sampling_defaults(repository / "transformer")


def test_an_unknown_scheduler_does_no_harm_where_a_solver_is_named(repository):
    write(repository, {"_class_name": "LCMScheduler"})
    assert sampling_defaults(repository / "transformer", solver_named=True) == PUBLISHED["wan"]
    write(repository, WAN)  # a known one still says the shift
    assert sampling_defaults(repository / "transformer", solver_named=True).solver == UniPCFlow(3.0)
