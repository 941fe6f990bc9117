"""The job behind `qvdjax sample`, on small Wan models in folders."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file
from two_hosts import ended, two_hosts

import models
import qvdjax
from experiments.calibrating import calibrate_folder, open_calibration
from experiments.sampling import sample_folder
from experiments.sampling.request import Settings
from experiments.training.job import train_folder
from models.pipeline import side_files
from qvdjax.diffusion import DDIM, FlowMatchEuler, UniPCFlow, initial_noise, sample
from qvdjax.errors import UserError
from qvdjax.recipes import get
from qvdjax.video import read_mp4

WORDS = ("a", "red", "blue", "disc", "moving", "left")
PIPELINE = small_models.pipeline(WORDS, 8, tokens=6, width=6)
# Between batches, devices and loops the same float32 operations are fused and summed in another order.
# Latents are of size 7, whose last bit is 5e-7. Some ten roundings a step, three steps, and guidance, which
# multiplies a difference between two predictions by up to 7, make 1e-4; 4e-6 was seen.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a pipeline."""
    return small_models.sampled_folder(tmp_path_factory.mktemp("models") / "tiny", PIPELINE)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model folder without a pipeline, and a file of text embeddings."""
    path = tmp_path_factory.mktemp("models") / "published"
    models.save(models.build(small_models.SAMPLED, key=jax.random.key(0)), path)
    context = path.parent / "context.safetensors"
    embeddings = np.random.default_rng(1).standard_normal((3, 6, 8)).astype(np.float32)
    save_file({"context": embeddings[:2], "negative_context": embeddings[2]}, context)
    return path, context


def by_hand(folder, prompts, seeds, **settings):
    """The latents one gets without the job, float32 (videos, ...)."""
    return np.asarray(
        sample(
            models.load(folder),
            PIPELINE.encode(prompts),
            PIPELINE.encode([settings.get("negative_prompt", "")] * len(prompts)),
            noise=initial_noise(seeds, PIPELINE.latents_shape),
            solver=UniPCFlow(settings.get("shift", 3.0)),
            steps=settings.get("steps", 3),
            guidance_scale=settings.get("guidance_scale", 4.0),
        ).latents
    )


def test_one_video_with_its_record(folder, tmp_path):
    output = tmp_path / "disc.mp4"
    report = sample_folder(folder, output, prompts=["a red disc"], seeds=[7], negative_prompt="a blue disc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disc.json", "disc.mp4"]
    assert report["files"] == [str(output)]

    clip = read_mp4(output)
    scale = 36  # of 8 pixels to 288
    assert clip.frames.shape == (3, 8 * scale, 12 * scale, 3)
    assert clip.fps == 8
    latents = by_hand(folder, ["a red disc"], [7], negative_prompt="a blue disc")
    expected = 255 * PIPELINE.decode(latents)[0].repeat(scale, axis=1).repeat(scale, axis=2)
    # What H.264 makes of noise in flat blocks of 36 pixels: colours blur at edges only.
    assert np.abs(clip.frames - expected).mean() < 8

    record = json.loads((tmp_path / "disc.json").read_text())
    assert record == report["videos"][0]
    expected = {
        "file": str(output),
        "prompt": "a red disc",
        "negative_prompt": "a blue disc",
        "seed": 7,
        "steps": 3,
        "guidance_scale": 4.0,
        "solver": "unipc",
        "shift": 3.0,
        "sigma_grid": "original",
        "frames": 3,
        "height": 8,
        "width": 12,
        "scale": scale,
        "fps": 8.0,
        "jax_version": jax.__version__,
        "peak_memory_of": "process",
    }
    assert {name: record[name] for name in expected} == expected
    assert record["device"].startswith("1 x")
    assert record["compile_seconds"] > 0
    assert record["seconds_per_step"] > 0
    assert record["peak_memory_bytes"] > 50e6  # the interpreter with jax alone is more
    assert record["quantization"]["recipe"] is None
    assert record["quantization"]["layers"].keys() == {"w32a32"}


def test_every_prompt_at_every_seed(folder, tmp_path):
    prompts = ["a red disc", "a Red disc", "a blue disc moving left"]
    report = sample_folder(folder, tmp_path / "out.safetensors", prompts=prompts, seeds=[3, 5], batch=4)
    names = ["a-red-disc-1", "a-red-disc-2", "a-blue-disc-moving-left"]
    expected = [f"out-{name}-{seed}" for name in names for seed in (3, 5)]
    assert report["files"] == [str(tmp_path / f"{name}.safetensors") for name in expected]
    assert {path.stem for path in tmp_path.glob("*.json")} == set(expected)
    assert report["batch"] == 4
    latents = np.stack([load_file(file)["latents"] for file in report["files"]])
    np.testing.assert_allclose(latents, by_hand(folder, np.repeat(prompts, 2), [3, 5] * 3), atol=ROUNDING)
    assert not np.allclose(latents[0], latents[1])
    np.testing.assert_allclose(latents[0], latents[2], atol=ROUNDING)  # case does not matter


def test_both_branches_in_one_batch_make_the_same_video(folder, tmp_path):
    report = sample_folder(folder, tmp_path / "out.safetensors", prompts=["a red disc"], seeds=[3], one_batch=True)
    assert report["one_batch"]
    latents = load_file(report["files"][0])["latents"]
    np.testing.assert_allclose(latents, by_hand(folder, ["a red disc"], [3])[0], atol=ROUNDING)


@pytest.mark.slow
def test_steps_with_attention_in_full_precision(folder, tmp_path):
    settings = {"prompts": ["a red disc"], "seeds": [3]}
    recipe = get("rtn-w8a8", attention_qk_bits=3, attention_pv_bits=3)
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    for path, chosen in ((quantized, recipe), (plain, get("rtn-w8a8"))):
        models.save(qvdjax.quantize(models.load(folder), chosen), path)
        PIPELINE.save(path)

    def latents(path, name, first=0, last=0):
        report = sample_folder(path, tmp_path / f"{name}.safetensors", **settings, float_attention=(first, last))
        assert report["float_attention"] == [first, last]
        return load_file(report["files"][0])["latents"]

    # Three steps: all of them are the model whose attention is not quantized.
    without = latents(plain, "without")
    np.testing.assert_allclose(latents(quantized, "all", 2, 1), without, atol=ROUNDING)
    errors = [np.abs(latents(quantized, f"{n}", n) - without).mean() for n in (0, 2)]
    assert errors[0] > errors[1] > 0
    with pytest.raises(UserError, match="not quantized"):
        latents(plain, "none", 1)


def test_settings_override_the_folder(folder, tmp_path):
    report = sample_folder(
        folder,
        tmp_path / "out.safetensors",
        prompts=["a disc"],
        seeds=[1],
        steps=2,
        guidance_scale=1.0,
        shift=5.0,
        solver="euler",
        frames=2,
        height=2,
        width=4,
        dtype="bfloat16",
    )
    shape = load_file(report["files"][0])["latents"].shape
    assert shape == (2, 2, 4, 12)
    record = report["videos"][0]
    expected = {"steps": 2, "guidance_scale": 1.0, "shift": 5.0, "solver": "euler", "latents": [2, 2, 4, 12]}
    assert {name: record[name] for name in expected} == expected
    assert "w16a16" in record["quantization"]["layers"]


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory):
    """A model folder whose solver draws noise at every step."""
    path = tmp_path_factory.mktemp("models") / "stochastic"
    models.save(models.build(small_models.SAMPLED, key=jax.random.key(0)), path)
    dataclasses.replace(PIPELINE, solver="dpm-sde", shift=None, solver_options={"snr_shift_scale": 1.0}).save(path)
    return path


def test_a_stochastic_solver_draws_each_videos_own_noise(stochastic, tmp_path):
    """In whatever batch a video is, on however many devices, and step by step: the same video."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, has {jax.device_count()}")
    settings = {"prompts": ["a red disc"], "steps": 3}
    three = sample_folder(stochastic, tmp_path / "three.safetensors", **settings, seeds=[7, 8, 9], batch=2)
    latents = [load_file(file)["latents"] for file in three["files"]]
    assert three["solver"] == "dpm-sde"
    assert three["snr_shift_scale"] == 1.0
    assert "shift" not in three
    eight = sample_folder(
        stochastic, tmp_path / "eight.safetensors", **settings, seeds=range(7, 15), mesh={"data": 4, "tensor": 2},
        step_loop=True,
    )  # fmt: skip
    for one, file in zip(latents, eight["files"]):
        np.testing.assert_allclose(load_file(file)["latents"], one, atol=ROUNDING)
    deterministic = sample_folder(stochastic, tmp_path / "ddim.safetensors", **settings, seeds=[7], solver="ddim")
    assert deterministic["snr_shift_scale"] == 1.0
    assert np.abs(load_file(deterministic["files"][0])["latents"] - latents[0]).max() > 0.1


def test_step_loop_reports_each_step_and_makes_the_same_video(folder, tmp_path):
    calls = []
    settings = {"prompts": ["a disc"], "seeds": [1, 2, 3], "batch": 2}
    looped = sample_folder(
        folder,
        tmp_path / "loop.safetensors",
        **settings,
        step_loop=True,
        progress=lambda *call: calls.append(call),
    )
    assert [call for call in calls if call[0] == "sampling"] == [("sampling", n, 6) for n in range(1, 7)]
    assert [call for call in calls if call[0] == "compiling"] == [("compiling", 0, 1), ("compiling", 1, 1)]
    calls.clear()
    scanned = sample_folder(
        folder, tmp_path / "scan.safetensors", **settings, progress=lambda *call: calls.append(call)
    )
    assert [call for call in calls if call[0] == "sampling"] == [("sampling", 2, 3), ("sampling", 3, 3)]
    for one, other in zip(looped["files"], scanned["files"], strict=True):
        np.testing.assert_allclose(load_file(one)["latents"], load_file(other)["latents"], atol=ROUNDING)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_same_video_on_one_device_and_on_eight(folder, tmp_path, mesh):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, has {jax.device_count()}")
    settings = {"prompts": ["a red disc", "a blue disc"], "seeds": [0, 1, 2, 3]}
    one = sample_folder(folder, tmp_path / "one.safetensors", **settings)
    eight = sample_folder(folder, tmp_path / "eight.safetensors", **settings, mesh=mesh)
    assert eight["device"].startswith("8 x")
    assert eight["mesh"] == mesh
    for first, second in zip(one["files"], eight["files"], strict=True):
        np.testing.assert_allclose(load_file(first)["latents"], load_file(second)["latents"], atol=ROUNDING)


@pytest.mark.parametrize("recipe", ["rtn-w8a8", pytest.param("rtn-w4a4", marks=pytest.mark.slow)])
def test_the_same_quantized_video_on_one_device_and_on_eight(folder, tmp_path, recipe):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, has {jax.device_count()}")
    quantized = tmp_path / recipe
    models.save(qvdjax.quantize(models.load(folder), recipe), quantized, side_files=side_files(folder))
    settings = {"prompts": ["a red disc"], "seeds": [0, 1, 2, 3], "steps": 2}
    one = sample_folder(quantized, tmp_path / "one.safetensors", **settings)
    eight = sample_folder(quantized, tmp_path / "eight.safetensors", **settings, mesh={"data": 4, "tensor": 2})
    assert one["quantization"]["recipe"] == recipe
    first, second = (np.stack([load_file(f)["latents"] for f in r["files"]]) for r in (one, eight))
    # Where rounding in float32 crosses the edge of a code, a value moves by a step: a 254th of a token's
    # range at 8 bits (a 14th at 4, sixteen times more rarely), in one of 32 summands. Two blocks and two
    # steps later a few of those make less than a hundredth of the whole.
    assert np.linalg.norm(first - second) / np.linalg.norm(first) < 1e-2


ONE_HOST = """
import sys
from experiments.sampling import sample_folder
from qvdjax.parallel import initialize_distributed
rank, address, folder, output = sys.argv[1:]
initialize_distributed(coordinator_address=address, num_processes=2, process_id=int(rank))
report = sample_folder(folder, output, prompts=["a disc"], seeds=[0, 1], mesh={"data": 2, "fsdp": 2})
assert report["device"].startswith("4 x"), report["device"]
assert len(report["files"]) == (2 if rank == "0" else 0), report["files"]
"""


@pytest.mark.slow
def test_the_same_video_on_two_hosts(folder, tmp_path):
    """Two processes of two devices each run the same command; the first one writes."""
    with two_hosts(lambda rank, address: ["-c", ONE_HOST, rank, address, folder, tmp_path / "two.safetensors"]) as both:
        for code, _, error in ended(both):
            assert code == 0, error
    one = sample_folder(folder, tmp_path / "one.safetensors", prompts=["a disc"], seeds=[0, 1])
    for file in one["files"]:
        other = load_file(file.replace("one-", "two-"))["latents"]
        np.testing.assert_allclose(load_file(file)["latents"], other, atol=ROUNDING)


def test_a_folder_without_a_pipeline_samples_embeddings_to_latents(published, tmp_path):
    folder, context = published
    report = sample_folder(
        folder,
        tmp_path / "out.safetensors",
        context_file=context,
        seeds=[4],
        steps=2,
        frames=3,
        height=4,
        width=6,
    )
    assert report["files"] == [str(tmp_path / f"out-text{row}-4.safetensors") for row in (0, 1)]
    record = report["videos"][1]
    expected = {"prompt": None, "seed": 4, "shift": 5.0, "guidance_scale": 5.0, "solver": "unipc"}
    assert {name: record[name] for name in expected} == expected
    embeddings = load_file(context)
    want = sample(
        models.load(folder),
        embeddings["context"][1:],
        embeddings["negative_context"][None],
        noise=initial_noise([4], (3, 4, 6, 12)),
        solver=UniPCFlow(5.0),
        steps=2,
        guidance_scale=5.0,
    )
    np.testing.assert_allclose(load_file(report["files"][1])["latents"], want.latents[0], atol=ROUNDING)


def test_the_scheduler_beside_a_published_model_counts(published, tmp_path):
    folder, context = published
    repository = tmp_path / "repository"
    (repository / "scheduler").mkdir(parents=True)
    (repository / "transformer").mkdir()
    for file in folder.iterdir():
        (repository / "transformer" / file.name).symlink_to(file)
    config = repository / "scheduler" / "scheduler_config.json"
    settings = {"context_file": context, "seeds": [4], "steps": 1, "frames": 3, "height": 4, "width": 6}

    def run(**options):
        return sample_folder(repository / "transformer", tmp_path / "out.safetensors", **settings, **options)

    config.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}')
    report = run()
    assert (report["solver"], report["shift"]) == ("euler", 7.0)
    report = run(solver="unipc", dynamic_guidance="step")
    assert (report["solver"], report["shift"], report["dynamic_guidance"]) == ("unipc", 7.0, "step")
    assert report["guidance_until"] == 0
    assert run(guidance_until=400.0)["guidance_until"] == 400
    config.write_text('{"_class_name": "LCMScheduler"}')
    with pytest.raises(UserError, match="asks for 'LCMScheduler'"):
        run()
    assert run(solver="euler")["shift"] == 5.0


@pytest.fixture(scope="module")
def hunyuanvideo(tmp_path_factory):
    """A folder of a HunyuanVideo, what two texts are to it, and how small videos of it are asked for."""
    path = tmp_path_factory.mktemp("models") / "hunyuanvideo"
    models.save(small_models.hunyuanvideo(), path)
    inputs = small_models.hunyuanvideo_inputs()
    names = ("context", "pooled_projections", "encoder_attention_mask")
    texts = {name: np.asarray(inputs[name], np.float32) for name in names}
    return path, texts, {"seeds": [4], "steps": 2, "frames": 3, "height": 8, "width": 6}


def test_a_published_hunyuanvideo_is_given_its_guidance_in_one_pass(hunyuanvideo, tmp_path):
    folder, texts, settings = hunyuanvideo
    file = tmp_path / "texts.safetensors"
    save_file(texts, file)
    report = sample_folder(folder, tmp_path / "out.safetensors", context_file=file, **settings)
    expected = {"solver": "euler", "shift": 7.0, "guidance_scale": 6.0}
    assert {name: report[name] for name in expected} == expected
    want = sample(
        models.load(folder),
        texts["context"],
        noise=initial_noise([4, 4], (3, 8, 6, 5)),
        solver=FlowMatchEuler(7.0),
        steps=2,
        pooled_projections=texts["pooled_projections"],
        encoder_attention_mask=texts["encoder_attention_mask"],
        guidance=np.full(2, 6000.0, np.float32),
    )
    for row, out in enumerate(report["files"]):
        np.testing.assert_allclose(load_file(out)["latents"], want.latents[row], atol=ROUNDING)
    other = sample_folder(folder, tmp_path / "2.safetensors", context_file=file, guidance_scale=1.0, **settings)
    assert other["guidance_scale"] == 1
    assert np.abs(load_file(other["files"][1])["latents"] - want.latents[1]).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ({"pooled_projections": None}, {}, "holds no tensor 'pooled_projections'"),
        ({"pooled_projections": np.ones((2, 5), np.float32)}, {}, "pooled_projections of shape .2, 5."),
        ({"encoder_attention_mask": np.ones((2, 6), np.float32)}, {}, "encoder_attention_mask of shape .2, 6."),
        ({"encoder_attention_mask": np.tile(np.arange(7.0) > 2, (2, 1))}, {}, "is not ones before zeros"),
        ({}, {"dynamic_guidance": "step"}, "given its guidance scale as an input"),
        ({}, {"guidance_scale": float("nan")}, "guidance scale is nan"),
    ],
)
def test_texts_that_hunyuanvideo_cannot_take(hunyuanvideo, tmp_path, change, options, named):
    folder, texts, settings = hunyuanvideo
    texts = {name: array for name, array in {**texts, **change}.items() if array is not None}
    save_file(texts, tmp_path / "texts.safetensors")
    with pytest.raises(UserError, match=named):
        sample_folder(
            folder, tmp_path / "out.safetensors", context_file=tmp_path / "texts.safetensors", **settings, **options
        )
    assert [file.name for file in tmp_path.iterdir()] == ["texts.safetensors"]


def test_a_hunyuanvideo_is_calibrated_with_its_conditions(hunyuanvideo, tmp_path):
    folder, texts, settings = hunyuanvideo
    save_file(texts, tmp_path / "texts.safetensors")
    asked = Settings(**{name: settings[name] for name in ("steps", "frames", "height", "width")})
    report = calibrate_folder(folder, tmp_path / "set", context_file=tmp_path / "texts.safetensors", settings=asked)
    assert (report["samples"], report["model_inputs"], report["guidance_scale"]) == (2, 4, 6.0)
    first, *_, last = open_calibration(tmp_path / "set", folder)
    assert first.keys() == {"latents", "timestep", *texts, "guidance"}
    for name, array in texts.items():
        np.testing.assert_array_equal(last[name], np.stack([array[1]] * 2))  # the second text at both steps
    assert last["guidance"].tolist() == [6000.0, 6000.0]
    # What the model was given at the second step is where the first led to.
    model, row = models.load(folder), {name: array[:1] for name, array in first.items()}
    step = np.float32(0.875 - 1)  # two steps of shift 7: noise levels 1, 0.875, 0
    np.testing.assert_allclose(row["latents"] + step * model(**row), first["latents"][1:], atol=ROUNDING)


def test_training_that_knows_no_conditions_says_so(hunyuanvideo, tmp_path):
    with pytest.raises(UserError, match="cannot be trained here"):
        train_folder(hunyuanvideo[0], tmp_path / "trained", recipe="lsq-w4a4", data=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_published_cogvideox_is_sampled_as_its_scripts_do(tmp_path):
    """Without a scheduler beside it: DDIM on v; with the published one that adds noise, that one."""
    folder, context = tmp_path / "transformer", tmp_path / "context.safetensors"
    models.save(small_models.cogvideox("5b"), folder)
    embeddings = np.random.default_rng(1).standard_normal((2, 7, 24)).astype(np.float32)
    save_file({"context": embeddings[0], "negative_context": embeddings[1]}, context)
    settings = {"context_file": context, "seeds": [4], "steps": 2, "frames": 3, "height": 8, "width": 6}
    report = sample_folder(folder, tmp_path / "out.safetensors", **settings)
    expected = {"solver": "ddim", "snr_shift_scale": 1.0, "prediction_type": "v_prediction", "guidance_scale": 6.0}
    assert {name: report[name] for name in expected} == expected
    want = sample(
        models.load(folder),
        embeddings[:1],
        embeddings[1:],
        noise=initial_noise([4], (3, 8, 6, 5)),
        solver=DDIM(snr_shift_scale=1.0),
        steps=2,
        guidance_scale=6.0,
    )
    latents = load_file(report["files"][0])["latents"]
    np.testing.assert_allclose(latents, want.latents[0], atol=ROUNDING)

    scheduler = {
        "_class_name": "CogVideoXDPMScheduler",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    report = sample_folder(folder, tmp_path / "out.safetensors", **settings, dynamic_guidance="timestep")
    expected = {"solver": "dpm-sde", "snr_shift_scale": 3.0, "rescale_betas_zero_snr": False}
    assert {name: report[name] for name in expected} == expected
    assert np.abs(load_file(report["files"][0])["latents"] - latents).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompts": ["a green disc"]}, "green.*it knows a, red"),
        ({"prompts": ["a disc", "a disc"]}, "prompts are given more than once"),
        ({"seeds": []}, "no seed"),
        ({"seeds": [-1]}, "seeds out of range"),
        ({"steps": 0}, "steps is 0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"solver": "heun"}, "no solver called 'heun'"),
        ({"solver": "ddim"}, "'ddim' is for models of variance-preserving diffusion.*unipc, euler"),
        ({"dynamic_guidance": "cosine"}, "kind 'cosine'"),
        ({"height": 3}, "height 3 is no multiple"),
        ({"frames": 0}, "0 x 4 x 6"),
        ({"context_file": "x.safetensors"}, "encodes prompts itself"),
        ({"mesh": {"data": 99}}, "99"),
    ],
)
def test_settings_that_do_not_fit(folder, tmp_path, settings, named):
    with pytest.raises(UserError, match=named):
        sample_folder(folder, tmp_path / "out.mp4", **{"prompts": ["a disc"], **settings})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "has no pipeline.json, so it cannot encode prompts.*context file"),
        ({"context": True, "height": 0}, "latents of 21 x 0 x 104"),
        ({"context": True, "prompts": ["a disc"]}, "prompts were given"),
        ({"context": {"context": np.zeros((6, 8), np.float32)}}, "no tensor 'negative_context'"),
        ({"context": {"context": np.full((6, 8), np.nan, np.float32)}, "guidance_scale": 1}, "no finite"),
        (
            {"context": {"context": np.zeros((6, 9), np.float32)}, "guidance_scale": 1, "frames": 3}
            | {"height": 4, "width": 6},
            r"context of shape \(1, 6, 9\)",
        ),
    ],
)
def test_folders_without_a_pipeline_that_cannot_be_sampled(published, tmp_path, settings, named):
    folder, context = published
    settings = dict(settings)
    given = settings.pop("context", None)
    if given is True:
        settings["context_file"] = context
    elif given is not None:
        save_file(given, tmp_path / "context.safetensors")
        settings["context_file"] = tmp_path / "context.safetensors"
    with pytest.raises(UserError, match=named):
        sample_folder(folder, tmp_path / "out.safetensors", **settings)
    assert not (tmp_path / "out.safetensors").exists()


def test_outputs_that_cannot_be_written(folder, published, tmp_path):
    settings = {"prompts": ["a disc"]}
    with pytest.raises(UserError, match=r"out\.avi is neither"):
        sample_folder(folder, tmp_path / "out.avi", **settings)
    with pytest.raises(UserError, match="missing does not exist"):
        sample_folder(folder, tmp_path / "missing" / "out.mp4", **settings)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=r"folder\.mp4 cannot be written"):
        sample_folder(folder, tmp_path / "folder.mp4", **settings)
    with pytest.raises(UserError, match=r"no pipeline\.json, so nothing here can decode"):
        sample_folder(published[0], tmp_path / "out.mp4", context_file=published[1])
    with pytest.raises(UserError, match="no-model"):
        sample_folder(tmp_path / "no-model", tmp_path / "out.mp4", **settings)


def test_latents_that_are_not_finite_are_not_written(folder, tmp_path):
    model = models.load(folder)
    model.proj_out.weight[...] = 3e38 * jax.numpy.sign(model.proj_out.weight[...])  # finite, its products are not
    models.save(model, tmp_path / "model")
    PIPELINE.save(tmp_path / "model")
    with pytest.raises(UserError, match="not finite"):
        sample_folder(tmp_path / "model", tmp_path / "out.mp4", prompts=["a disc"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
